"""Arguments of a training run, and the parser that reads them."""

from .accelerator_config import AcceleratorConfig
from .base import TrainingArguments
from .enums import (
    DebugOption,
    ExplicitEnum,
    FSDPOption,
    HPSearchBackend,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    ParallelMode,
    SaveStrategy,
    SchedulerType,
)
from .parser import HfArg, HfArgumentParser
from .seq2seq import Seq2SeqTrainingArguments

__all__ = [
    "AcceleratorConfig",
    "DebugOption",
    "ExplicitEnum",
    "FSDPOption",
    "HPSearchBackend",
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
]
