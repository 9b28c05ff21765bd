"""Upstream's module of this name: the same import with another first word."""

from trainer.arguments import AcceleratorConfig as AcceleratorConfig
from trainer.evaluation.nested import detached as nested_detach
from trainer.evaluation.nested import to_numpy as nested_numpify
from trainer.helpers import LengthGroupedSampler as LengthGroupedSampler
from trainer.helpers import get_model_param_count as get_model_param_count
from trainer.helpers import get_parameter_names as get_parameter_names
from trainer.helpers import nested_concat as nested_concat
from trainer.helpers import torch_distributed_zero_first as torch_distributed_zero_first
from trainer.smoothing import LabelSmoother as LabelSmoother

__all__ = [
    "AcceleratorConfig",
    "LabelSmoother",
    "LengthGroupedSampler",
    "get_model_param_count",
    "get_parameter_names",
    "nested_concat",
    "nested_detach",
    "nested_numpify",
    "torch_distributed_zero_first",
]
