"""trainer: the Hugging Face Trainer's interface over the pure core ``trainstep``.

Names are loaded when they are first used, so that ``import trainer`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "trainer.trainer": ("Trainer", "set_seed"),
    "trainer.seq2seq": ("Seq2SeqTrainer",),
    "trainer.arguments": (
        "HfArgumentParser",
        "IntervalStrategy",
        "SaveStrategy",
        "SchedulerType",
        "Seq2SeqTrainingArguments",
        "TrainingArguments",
    ),
    "trainer.callbacks": (
        "DefaultFlowCallback",
        "EarlyStoppingCallback",
        "PrinterCallback",
        "ProgressCallback",
        "TrainerCallback",
        "TrainerControl",
        "TrainerState",
    ),
    "trainer.checkpoint": ("CheckpointError",),
    "trainer.data.collators": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorWithPadding",
        "default_data_collator",
    ),
    "trainer.interrupt": ("TrainingInterrupted",),
    "trainer.outputs": ("EvalPrediction", "PredictionOutput", "TrainOutput"),
    "trainer.profiling": ("ProfilerCallback",),
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
    from trainer.arguments import HfArgumentParser as HfArgumentParser
    from trainer.arguments import IntervalStrategy as IntervalStrategy
    from trainer.arguments import SaveStrategy as SaveStrategy
    from trainer.arguments import SchedulerType as SchedulerType
    from trainer.arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from trainer.arguments import TrainingArguments as TrainingArguments
    from trainer.callbacks import DefaultFlowCallback as DefaultFlowCallback
    from trainer.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from trainer.callbacks import PrinterCallback as PrinterCallback
    from trainer.callbacks import ProgressCallback as ProgressCallback
    from trainer.callbacks import TrainerCallback as TrainerCallback
    from trainer.callbacks import TrainerControl as TrainerControl
    from trainer.callbacks import TrainerState as TrainerState
    from trainer.checkpoint import CheckpointError as CheckpointError
    from trainer.data.collators import (
        DataCollatorForLanguageModeling as DataCollatorForLanguageModeling,
    )
    from trainer.data.collators import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
    from trainer.data.collators import (
        DataCollatorForTokenClassification as DataCollatorForTokenClassification,
    )
    from trainer.data.collators import DataCollatorWithPadding as DataCollatorWithPadding
    from trainer.data.collators import default_data_collator as default_data_collator
    from trainer.interrupt import TrainingInterrupted as TrainingInterrupted
    from trainer.outputs import EvalPrediction as EvalPrediction
    from trainer.outputs import PredictionOutput as PredictionOutput
    from trainer.outputs import TrainOutput as TrainOutput
    from trainer.profiling import ProfilerCallback as ProfilerCallback
    from trainer.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from trainer.trainer import Trainer as Trainer
    from trainer.trainer import set_seed as set_seed
