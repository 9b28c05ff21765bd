"""trainer: the Hugging Face Trainer's interface over the pure core ``trainstep``.

Names are loaded when they are first used, so that ``import trainer`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "trainer.trainer": ("Trainer",),
    "trainer.seq2seq": ("Seq2SeqTrainer",),
    "trainer.arguments": (
        "AcceleratorConfig",
        "DebugOption",
        "FSDPOption",
        "HfArg",
        "HfArgumentParser",
        "HubStrategy",
        "IntervalStrategy",
        "OptimizerNames",
        "ParallelMode",
        "SaveStrategy",
        "SchedulerType",
        "Seq2SeqTrainingArguments",
        "TrainingArguments",
    ),
    "trainer.callbacks": (
        "CallbackHandler",
        "DefaultFlowCallback",
        "EarlyStoppingCallback",
        "ExportableState",
        "NotebookProgressCallback",
        "PrinterCallback",
        "ProgressCallback",
        "TrainerCallback",
        "TrainerControl",
        "TrainerState",
    ),
    "trainer.checkpoint": ("CheckpointError",),
    "trainer.data.collators": (
        "DataCollator",
        "DataCollatorForLanguageModeling",
        "DataCollatorForMultipleChoice",
        "DataCollatorForPermutationLanguageModeling",
        "DataCollatorForSOP",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorForWholeWordMask",
        "DataCollatorMixin",
        "DataCollatorWithFlattening",
        "DataCollatorWithPadding",
        "DefaultDataCollator",
        "default_data_collator",
    ),
    "trainer.debug": ("DebugUnderflowOverflow",),
    "trainer.determinism": (
        "enable_full_determinism",
        "set_seed",
    ),
    "trainer.helpers": (
        "get_last_checkpoint",
        "torch_distributed_zero_first",
    ),
    "trainer.interrupt": ("TrainingInterrupted",),
    "trainer.optimizers.functions": (
        "GreedyLR",
        "get_constant_schedule",
        "get_constant_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_cosine_with_min_lr_schedule_with_warmup",
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        "get_greedy_schedule",
        "get_inverse_sqrt_schedule",
        "get_linear_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
        "get_reduce_on_plateau_schedule",
        "get_scheduler",
        "get_wsd_schedule",
    ),
    "trainer.outputs": (
        "EvalLoopOutput",
        "EvalPrediction",
        "PredictionOutput",
        "TrainOutput",
    ),
    "trainer.profiling": ("ProfilerCallback",),
    "trainer.smoothing": ("LabelSmoother",),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from trainer.arguments import AcceleratorConfig as AcceleratorConfig
    from trainer.arguments import DebugOption as DebugOption
    from trainer.arguments import FSDPOption as FSDPOption
    from trainer.arguments import HfArg as HfArg
    from trainer.arguments import HfArgumentParser as HfArgumentParser
    from trainer.arguments import HubStrategy as HubStrategy
    from trainer.arguments import IntervalStrategy as IntervalStrategy
    from trainer.arguments import OptimizerNames as OptimizerNames
    from trainer.arguments import ParallelMode as ParallelMode
    from trainer.arguments import SaveStrategy as SaveStrategy
    from trainer.arguments import SchedulerType as SchedulerType
    from trainer.arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from trainer.arguments import TrainingArguments as TrainingArguments
    from trainer.callbacks import CallbackHandler as CallbackHandler
    from trainer.callbacks import DefaultFlowCallback as DefaultFlowCallback
    from trainer.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from trainer.callbacks import ExportableState as ExportableState
    from trainer.callbacks import NotebookProgressCallback as NotebookProgressCallback
    from trainer.callbacks import PrinterCallback as PrinterCallback
    from trainer.callbacks import ProgressCallback as ProgressCallback
    from trainer.callbacks import TrainerCallback as TrainerCallback
    from trainer.callbacks import TrainerControl as TrainerControl
    from trainer.callbacks import TrainerState as TrainerState
    from trainer.checkpoint import CheckpointError as CheckpointError
    from trainer.data.collators import DataCollator as DataCollator
    from trainer.data.collators import (
        DataCollatorForLanguageModeling as DataCollatorForLanguageModeling,
    )
    from trainer.data.collators import (
        DataCollatorForMultipleChoice as DataCollatorForMultipleChoice,
    )
    from trainer.data.collators import (
        DataCollatorForPermutationLanguageModeling as DataCollatorForPermutationLanguageModeling,
    )
    from trainer.data.collators import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
    from trainer.data.collators import DataCollatorForSOP as DataCollatorForSOP
    from trainer.data.collators import (
        DataCollatorForTokenClassification as DataCollatorForTokenClassification,
    )
    from trainer.data.collators import DataCollatorForWholeWordMask as DataCollatorForWholeWordMask
    from trainer.data.collators import DataCollatorMixin as DataCollatorMixin
    from trainer.data.collators import DataCollatorWithFlattening as DataCollatorWithFlattening
    from trainer.data.collators import DataCollatorWithPadding as DataCollatorWithPadding
    from trainer.data.collators import DefaultDataCollator as DefaultDataCollator
    from trainer.data.collators import default_data_collator as default_data_collator
    from trainer.debug import DebugUnderflowOverflow as DebugUnderflowOverflow
    from trainer.determinism import enable_full_determinism as enable_full_determinism
    from trainer.determinism import set_seed as set_seed
    from trainer.helpers import get_last_checkpoint as get_last_checkpoint
    from trainer.helpers import torch_distributed_zero_first as torch_distributed_zero_first
    from trainer.interrupt import TrainingInterrupted as TrainingInterrupted
    from trainer.optimizers.functions import *  # noqa: F403
    from trainer.outputs import EvalLoopOutput as EvalLoopOutput
    from trainer.outputs import EvalPrediction as EvalPrediction
    from trainer.outputs import PredictionOutput as PredictionOutput
    from trainer.outputs import TrainOutput as TrainOutput
    from trainer.profiling import ProfilerCallback as ProfilerCallback
    from trainer.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from trainer.smoothing import LabelSmoother as LabelSmoother
    from trainer.trainer import Trainer as Trainer
