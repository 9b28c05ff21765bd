"""Upstream's module of this name: the same import with another first word."""

from trainer.callbacks import CallbackHandler as CallbackHandler
from trainer.callbacks import DefaultFlowCallback as DefaultFlowCallback
from trainer.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
from trainer.callbacks import ExportableState as ExportableState
from trainer.callbacks import PrinterCallback as PrinterCallback
from trainer.callbacks import ProgressCallback as ProgressCallback
from trainer.callbacks import TrainerCallback as TrainerCallback
from trainer.callbacks import TrainerControl as TrainerControl
from trainer.callbacks import TrainerState as TrainerState
