"""Callbacks: the events of the training loop, the state they see, and how they steer it."""

from .base import EVENTS, ExportableState, TrainerCallback
from .control import TrainerControl
from .early_stopping import EarlyStoppingCallback
from .export import (
    export_callback_states,
    export_states,
    is_exportable,
    restore_callback_states,
)
from .flow import DEFAULT_CALLBACKS, DefaultFlowCallback
from .handler import CallbackHandler
from .jsonable import to_jsonable
from .notebook import NotebookProgressCallback, default_progress_callback, in_notebook
from .progress import PrinterCallback, ProgressCallback
from .state import TRAINER_STATE_NAME, TrainerState

__all__ = [
    "DEFAULT_CALLBACKS",
    "EVENTS",
    "TRAINER_STATE_NAME",
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
    "default_progress_callback",
    "export_callback_states",
    "export_states",
    "in_notebook",
    "is_exportable",
    "restore_callback_states",
    "to_jsonable",
]
