"""The fields of ``TrainingArguments``, one mixin for each topic."""

from .compute import ComputeFields
from .data import DataFields
from .distributed import DistributedFields
from .evaluation import EvaluationFields
from .extensions import ExtensionFields
from .logs import LoggingFields
from .optimization import OptimizerFields
from .saving import SavingFields
from .training import TrainingFields

__all__ = [
    "ComputeFields",
    "DataFields",
    "DistributedFields",
    "EvaluationFields",
    "ExtensionFields",
    "LoggingFields",
    "OptimizerFields",
    "SavingFields",
    "TrainingFields",
]
