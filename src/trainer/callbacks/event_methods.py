"""The sixteen events as methods: which control switch each resets, and what it passes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .control import TrainerControl
from .state import TrainerState


class EventMethods:
    """Mixin for an object that dispatches events: one method for each event.

    A switch is reset before the callbacks run, so that one of them can set it again.
    """

    def refresh(self) -> None:
        """Forget what is remembered of the callbacks."""
        raise NotImplementedError

    def call_event(
        self,
        event: str,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Call `event` on the callbacks and return the control object to use next."""
        raise NotImplementedError

    def on_init_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_init_end``."""
        return self.call_event("on_init_end", args, state, control, **kwargs)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reset ``should_training_stop``, then fire ``on_train_begin``."""
        self.refresh()
        control._new_training()
        return self.call_event("on_train_begin", args, state, control, **kwargs)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_train_end``."""
        return self.call_event("on_train_end", args, state, control, **kwargs)

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reset ``should_epoch_stop``, then fire ``on_epoch_begin``."""
        control._new_epoch()
        return self.call_event("on_epoch_begin", args, state, control, **kwargs)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_epoch_end``."""
        return self.call_event("on_epoch_end", args, state, control, **kwargs)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reset ``should_log``, ``should_evaluate``, ``should_save``, then fire the event."""
        control._new_step()
        return self.call_event("on_step_begin", args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_pre_optimizer_step``."""
        return self.call_event("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_optimizer_step``."""
        return self.call_event("on_optimizer_step", args, state, control, **kwargs)

    def on_substep_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_substep_end``."""
        return self.call_event("on_substep_end", args, state, control, **kwargs)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_step_end``."""
        return self.call_event("on_step_end", args, state, control, **kwargs)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any],
        **kwargs: Any,
    ) -> TrainerControl:
        """Reset ``should_evaluate``, then fire ``on_evaluate``."""
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any],
        **kwargs: Any,
    ) -> TrainerControl:
        """Fire ``on_predict``."""
        return self.call_event("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reset ``should_save``, then fire ``on_save``."""
        control.should_save = False
        return self.call_event("on_save", args, state, control, **kwargs)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> TrainerControl:
        """Reset ``should_log``, then fire ``on_log`` with a copy of `logs`.

        All callbacks share the copy: what one adds the later ones see, but the record that
        `Trainer.train` and `Trainer.evaluate` return stays what it was.
        """
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=dict(logs), **kwargs)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_prediction_step``."""
        return self.call_event("on_prediction_step", args, state, control, **kwargs)

    def on_push_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Fire ``on_push_begin``."""
        return self.call_event("on_push_begin", args, state, control, **kwargs)
