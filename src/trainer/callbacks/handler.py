"""Pass the events of the training loop on to the callbacks that listen to them."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Iterable
from typing import Any

from .base import EVENTS, TrainerCallback
from .control import TrainerControl
from .event_methods import EventMethods
from .flow import DefaultFlowCallback
from .state import TrainerState

logger = logging.getLogger(__name__)

# What happens in every step; other events are rare enough to look around after each.
_FREQUENT = frozenset(
    {
        "on_step_begin",
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_step_end",
        "on_prediction_step",
    }
)


class CallbackHandler(EventMethods):
    """Hold the callbacks and call them in order.

    A callback is a `TrainerCallback` of this package or of transformers, or any object with some
    of the ``on_*`` methods. For each event the callbacks that override it are looked up once; the
    look-up is repeated when `callbacks` changes (also by direct assignment or mutation) and when
    training begins.

    Attributes:
        callbacks: The callbacks, in the order in which they are called.
        model, processing_class, optimizer, lr_scheduler, train_dataloader, eval_dataloader:
            Passed by keyword to every event.
        interventions: Counts the events at which code of others may have changed something: those
            to which a callback that is not part of this package listens, and all rare ones.
    """

    def __init__(
        self,
        callbacks: Iterable[Any],
        model: Any,
        processing_class: Any,
        optimizer: Any,
        lr_scheduler: Any,
    ) -> None:
        self.callbacks: list[Any] = []
        self._known: list[Any] = []
        self._listeners: dict[str, tuple[Any, ...]] = {}
        self._open: dict[str, bool] = {}
        self.interventions = 0
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        for callback in callbacks:
            self.add_callback(callback)
        if not any(map(_controls_flow, self.callbacks)):
            logger.warning(
                "There is no DefaultFlowCallback among the callbacks (%s): the logging, evaluation "
                "and save strategies have no effect and training does not stop at max_steps by "
                "itself.",
                ", ".join(self.callback_list.splitlines()) or "none",
            )

    @property
    def callback_list(self) -> str:
        """The class names of the callbacks, one a line."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def add_callback(self, callback: Any) -> None:
        """Append a callback, given as an object or as a class to be called without arguments.

        A second one of the same class is accepted, with a warning.

        Raises:
            TypeError: The object has none of the events.
        """
        added = callback() if isinstance(callback, type) else callback
        kind = type(added)
        if not any(callable(getattr(added, event, None)) for event in EVENTS):
            raise TypeError(
                f"a callback must be a TrainerCallback or have some of its events, got "
                f"{kind.__name__}, which has none of {', '.join(EVENTS)}"
            )
        if any(type(present) is kind for present in self.callbacks):
            logger.warning(
                "a %s is added although there is one already. The callbacks are:\n%s",
                kind.__name__,
                self.callback_list,
            )
        self.callbacks.append(added)

    def pop_callback(self, callback: Any) -> Any | None:
        """Remove and return a callback: the object given, or the first one of the class given.

        Returns None if there is no such callback.
        """
        index = self._find(callback)
        return None if index is None else self.callbacks.pop(index)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback: the object given, or the first one of the class given, if any.

        Raises:
            ValueError: An object was given that is not among the callbacks.
        """
        index = self._find(callback)
        if index is not None:
            del self.callbacks[index]
        elif not isinstance(callback, type):
            raise ValueError(
                f"cannot remove this {type(callback).__name__}: it is not among the callbacks "
                f"({', '.join(self.callback_list.splitlines()) or 'none'})"
            )

    def _find(self, callback: Any) -> int | None:
        for index, present in enumerate(self.callbacks):
            if isinstance(callback, type) and isinstance(present, callback):
                return index
            if present is callback:
                return index
        return None

    def refresh(self) -> None:
        """Look up again which callbacks listen to which event.

        Only needed where a method was set on a callback, or on its class, during training.
        """
        self._known = list(self.callbacks)
        self._listeners = {}

    def listens(self, event: str) -> bool:
        """Tell whether any callback has more than an empty method for `event`."""
        return bool(self._listeners_of(event))

    def _listeners_of(self, event: str) -> tuple[Any, ...]:
        callbacks, known = self.callbacks, self._known
        if len(callbacks) != len(known) or not all(map(operator.is_, callbacks, known)):
            self.refresh()
        listeners = self._listeners.get(event)
        if listeners is None:
            listeners = tuple(item for item in self.callbacks if _overrides(item, event))
            self._listeners[event] = listeners
            self._open[event] = event not in _FREQUENT or any(map(_may_intervene, listeners))
        return listeners

    def has_foreign_listeners(self, event: str) -> bool:
        """Whether a callback that is not part of this package listens to `event`."""
        return any(map(_is_foreign, self._listeners_of(event)))

    def call_event(
        self,
        event: str,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Call `event` on the callbacks that have it and return the control object to use next.

        A callback that returns something other than None replaces the control object for the
        callbacks after it and for the caller. `event` may also be a name of your own.

        Raises:
            TypeError: A callback returned something that is no control object.
        """
        for callback in self._listeners_of(event):
            result = getattr(callback, event)(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **kwargs,
            )
            if result is not None and result is not control:
                control = _checked_control(result, callback, event)
        self.interventions += self._open[event]
        return control


def _is_foreign(callback: Any) -> bool:
    return type(callback).__module__.partition(".")[0] != __name__.partition(".")[0]


def _may_intervene(callback: Any) -> bool:
    return _is_foreign(callback) and not getattr(callback, "leaves_model_alone", False)


def _overrides(callback: Any, event: str) -> bool:
    """Tell whether `callback` has a method for `event` other than a base class's empty one."""
    method = getattr(callback, event, None)
    if not callable(method):
        return False
    function = getattr(method, "__func__", method)
    return not any(function is getattr(base, event, None) for base in _base_classes())


def _base_classes() -> list[type]:
    """Return the classes whose events do nothing: ours, and transformers' if that is loaded."""
    guest = sys.modules.get("transformers.trainer_callback")
    guest_base = getattr(guest, "TrainerCallback", None)
    return [TrainerCallback] if guest_base is None else [TrainerCallback, guest_base]


def _controls_flow(callback: Any) -> bool:
    """Tell whether `callback` is a DefaultFlowCallback, ours or (by its name) transformers'."""
    return any(base.__name__ == DefaultFlowCallback.__name__ for base in type(callback).__mro__)


def _checked_control(result: Any, callback: Any, event: str) -> TrainerControl:
    if not hasattr(result, "should_training_stop"):
        raise TypeError(
            f"{type(callback).__name__}.{event} returned {result!r} ({type(result).__name__}); "
            "a callback must return None or the TrainerControl to use from there on"
        )
    control: TrainerControl = result
    return control
