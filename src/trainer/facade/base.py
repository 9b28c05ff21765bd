"""What the mixins share: the attributes that ``Trainer.__init__`` sets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import trainstep as ts
from trainer.arguments import TrainingArguments
from trainer.callbacks import CallbackHandler, TrainerControl, TrainerState
from trainer.checkpoint import BackgroundWriter
from trainer.distributed.deepspeed_plan import Zero
from trainer.memory import MemoryTracker
from trainer.optimizers import Adopted, Rates
from trainer.smoothing import LabelSmoother
from trainer.support import why_missing
from trainer.tokens import TokenCounter


class TrainerBase:
    """Attributes of a Trainer; see there for those that are public."""

    args: TrainingArguments
    model: nn.Module
    model_wrapped: Any
    model_init: Callable[..., nn.Module] | None
    train_dataset: Any
    eval_dataset: Any
    data_collator: Callable[[list[Any]], Any]
    processing_class: Any
    compute_metrics: Callable[..., dict[str, Any]] | None
    compute_loss_func: Callable[..., Tensor] | None
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    label_names: list[str]
    can_return_loss: bool
    model_accepts_loss_kwargs: bool
    current_gradient_accumulation_steps: int
    is_in_train: bool
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    label_smoother: LabelSmoother | None
    current_flos: float
    _tokens: TokenCounter
    _memory: MemoryTracker
    _train_batch_size: int
    _signature_columns: list[str] | None
    _loss_takes_items: bool
    _adopted: Adopted | None
    _made: tuple[Any, Any]  # the optimizer and the scheduler that the Trainer made itself
    _train_state: ts.TrainState | None
    _run: Any
    _meter: Any
    _records: Any
    # What gradients of the micro-batch count in the mean over processes; read by ``_backward``.
    _gradient_weight: float = 1
    _rates: Rates
    _zero: Zero | None  # with DeepSpeed
    _writer: BackgroundWriter | None
    _interruption: Any

    def _overrides(self, method: str) -> bool:
        """Tell whether a class from outside of this package defines a method in place of ours."""
        kind = next(kind for kind in type(self).__mro__ if method in vars(kind))
        return kind.__module__.partition(".")[0] != "trainer"

    def __getattr__(self, name: str) -> Any:  # for type checkers also the other mixins' methods
        """Say why a method that the Hugging Face Trainer has is missing."""
        if (reason := why_missing(name)) is not None:
            raise AttributeError(f"{type(self).__name__}.{name}: {reason}", name=name, obj=self)
        return self.__getattribute__(name)  # raises what it raised, also inside of a property
