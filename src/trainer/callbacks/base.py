"""What a callback is: the events it may listen to, and how its state is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from .control import TrainerControl
    from .state import TrainerState


class TrainerCallback:
    """Base class of callbacks: override the events that interest you.

    Every event is called as ``event(args, state, control, **kwargs)``, where ``args`` are the
    training arguments, ``state`` is the `TrainerState` (to be read) and ``control`` is the
    `TrainerControl` (to be changed). ``kwargs`` holds ``model``, ``processing_class``,
    ``optimizer``, ``lr_scheduler``, ``train_dataloader`` and ``eval_dataloader``, and for some
    events ``metrics`` or ``logs``. An event returns None, or the control object that is to be used
    from there on. A "step" is one update of the weights.

    Events that a class does not override are never called, so they cost nothing.
    """

    def on_init_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run once, when the constructor of the Trainer is done."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run before the first epoch, after a checkpoint (if any) has been loaded."""

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after the last epoch, once the best model (if asked for) has been loaded."""

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run at the start of every epoch."""

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run at the end of every epoch, before what it asks for is logged, evaluated, saved."""

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run before the first micro-batch of every step."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after gradients were clipped and before the optimizer applies them.

        They are in the parameters' ``.grad`` and may be changed or replaced. Steps are not recorded in CUDA
        graphs where a callback has this event.
        """

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after the optimizer's update, before the learning rate moves on and gradients are dropped."""

    def on_substep_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after every micro-batch that only accumulates gradients."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after a step; ``state.global_step`` counts it already."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after an evaluation was logged; ``metrics`` holds its result."""

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after ``Trainer.predict``; ``metrics`` holds its result."""

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after a checkpoint was written."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after a record went into ``state.log_history``; ``logs`` is a copy of it."""

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run after every batch of an evaluation or a prediction."""

    def on_push_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Run before an upload to the Hub starts."""


EVENTS: tuple[str, ...] = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
"""The names of the sixteen events."""


class ExportableState:
    """Mixin for callbacks whose state belongs in a checkpoint.

    Example:
        ```python
        class Patience(TrainerCallback, ExportableState):
            def __init__(self, limit=3):
                self.limit, self.used = limit, 0

            def state(self):
                return {"args": {"limit": self.limit}, "attributes": {"used": self.used}}
        ```
    """

    def state(self) -> dict[str, Any]:
        """Return ``{"args": {...}, "attributes": {...}}``.

        ``args`` are keyword arguments for the constructor, ``attributes`` are what is set on the
        object afterwards. Values must fit in JSON.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is an ExportableState but does not define state(); "
            'return {"args": {...}, "attributes": {...}} from it'
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build an object from what `state` returned."""
        instance = cls(**state["args"])
        for name, value in state["attributes"].items():
            setattr(instance, name, value)
        return instance
