"""When to log, evaluate, save and stop: the strategies of the arguments, as a callback."""

from __future__ import annotations

from typing import Any

from .base import TrainerCallback
from .control import TrainerControl
from .state import TrainerState


def strategy_name(strategy: Any) -> str:
    """Return the name of a strategy that is a string or a string-valued enum."""
    return str(getattr(strategy, "value", strategy))


class DefaultFlowCallback(TrainerCallback):
    """Turn the strategies into control switches; it only ever switches on.

    Intervals are read from the state, where shares of a training have become numbers of steps. An
    interval of zero or less is never due.
    """

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Follow the "steps" strategies, and stop at the last step.

        The last step is evaluated and saved also where the interval does not hit it, but not
        logged for that reason.
        """
        step = state.global_step
        last = step >= state.max_steps
        if last:
            control.should_training_stop = True
        if (step == 1 and args.logging_first_step) or (
            strategy_name(args.logging_strategy) == "steps" and _is_due(step, state.logging_steps)
        ):
            control.should_log = True
        if (
            strategy_name(args.eval_strategy) == "steps"
            and (last or _is_due(step, state.eval_steps))
            and _delay(args) <= step
        ):
            control.should_evaluate = True
        if strategy_name(args.save_strategy) == "steps" and (
            last or _is_due(step, state.save_steps)
        ):
            control.should_save = True
        return control

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Follow the "epoch" strategies, also for an epoch that was cut short."""
        if strategy_name(args.logging_strategy) == "epoch":
            control.should_log = True
        if strategy_name(args.eval_strategy) == "epoch" and _delay(args) <= state.epoch:
            control.should_evaluate = True
        if strategy_name(args.save_strategy) == "epoch":
            control.should_save = True
        return control


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _delay(args: Any) -> float:
    """Return the evaluation delay, in steps or epochs as the strategy counts; None means none."""
    delay: float | None = args.eval_delay
    return 0 if delay is None else delay


DEFAULT_CALLBACKS: list[type[TrainerCallback]] = [DefaultFlowCallback]
"""The callbacks that every Trainer starts with."""
