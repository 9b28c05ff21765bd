"""Upstream's module of this name: the same import with another first word."""

from trainer.arguments import FSDPOption as FSDPOption
from trainer.arguments import HPSearchBackend as HPSearchBackend
from trainer.arguments import HubStrategy as HubStrategy
from trainer.arguments import IntervalStrategy as IntervalStrategy
from trainer.arguments import SaveStrategy as SaveStrategy
from trainer.arguments import SchedulerType as SchedulerType
from trainer.checkpoint.layout import PREFIX_CHECKPOINT_DIR as PREFIX_CHECKPOINT_DIR
from trainer.determinism import enable_full_determinism as enable_full_determinism
from trainer.determinism import seed_worker as seed_worker
from trainer.determinism import set_seed as set_seed
from trainer.evaluation.nested import plain_numbers as denumpify_detensorize
from trainer.helpers import get_last_checkpoint as get_last_checkpoint
from trainer.helpers import has_length as has_length
from trainer.helpers import number_of_arguments as number_of_arguments
from trainer.metrics import speed_metrics as speed_metrics
from trainer.outputs import EvalLoopOutput as EvalLoopOutput
from trainer.outputs import EvalPrediction as EvalPrediction
from trainer.outputs import PredictionOutput as PredictionOutput
from trainer.outputs import TrainOutput as TrainOutput

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "EvalLoopOutput",
    "EvalPrediction",
    "FSDPOption",
    "HPSearchBackend",
    "HubStrategy",
    "IntervalStrategy",
    "PredictionOutput",
    "SaveStrategy",
    "SchedulerType",
    "TrainOutput",
    "denumpify_detensorize",
    "enable_full_determinism",
    "get_last_checkpoint",
    "has_length",
    "number_of_arguments",
    "seed_worker",
    "set_seed",
    "speed_metrics",
]
