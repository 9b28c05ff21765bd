"""The strategies of the arguments become control switches."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import pytest

from trainer.callbacks import (
    DEFAULT_CALLBACKS,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)


class Strategy(str, enum.Enum):  # noqa: UP042 - its str() is not its value, as in transformers
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


def after_step(args: Any, **state: Any) -> TrainerControl:
    return DefaultFlowCallback().on_step_end(args, TrainerState(**state), TrainerControl())


def test_it_is_the_default_callback() -> None:
    assert [DefaultFlowCallback] == DEFAULT_CALLBACKS


@pytest.mark.row(119)
def test_every_combination_agrees_with_transformers(make_args: Any) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    grid = itertools.product(
        ("no", "steps", "epoch"),  # eval_strategy
        ("no", "steps", "epoch", "best"),  # save_strategy
        ("no", "steps", "epoch"),  # logging_strategy
        (False, True),  # logging_first_step
        (0, 4),  # eval_delay
        (1, 2, 3, 4, 6),  # global_step
        (2, 3),  # the intervals
    )
    for evaluate, save, log, first, delay, step, interval in grid:
        args = make_args(
            eval_strategy=evaluate,
            save_strategy=save,
            logging_strategy=log,
            logging_first_step=first,
            eval_delay=delay,
        )
        fields: dict[str, Any] = {
            "epoch": step / 2,
            "global_step": step,
            "max_steps": 4,
            "logging_steps": interval,
            "eval_steps": interval,
            "save_steps": interval,
        }
        for event in ("on_step_end", "on_epoch_end"):
            theirs = getattr(peer.DefaultFlowCallback(), event)(
                args, peer.TrainerState(**fields), peer.TrainerControl()
            )
            ours = getattr(DefaultFlowCallback(), event)(
                args, TrainerState(**fields), TrainerControl()
            )
            assert vars(ours) == vars(theirs), (event, args, fields)


def test_the_last_step_is_evaluated_and_saved_but_not_logged(make_args: Any) -> None:
    args = make_args(eval_strategy="steps")
    control = after_step(args, global_step=3, max_steps=3)
    assert control == TrainerControl(
        should_training_stop=True, should_save=True, should_evaluate=True
    )


@pytest.mark.parametrize("interval", [0, -1])
def test_intervals_of_zero_or_less_are_never_due(make_args: Any, interval: int) -> None:
    args = make_args(eval_strategy="steps")
    intervals = dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), interval)
    assert after_step(args, global_step=2, max_steps=9, **intervals) == TrainerControl()
    last = after_step(args, global_step=9, max_steps=9, **intervals)
    assert (last.should_save, last.should_evaluate, last.should_log) == (True, True, False)


def test_no_evaluation_delay_may_be_none(make_args: Any) -> None:
    args = make_args(eval_strategy="steps", eval_delay=None)
    assert after_step(args, global_step=2, max_steps=9, eval_steps=2).should_evaluate


def test_strategies_may_be_enums(make_args: Any) -> None:
    args = make_args(
        eval_strategy=Strategy.STEPS, save_strategy=Strategy.NO, logging_strategy=Strategy.NO
    )
    control = after_step(args, global_step=2, max_steps=9, eval_steps=2)
    assert control == TrainerControl(should_evaluate=True)


def test_switches_that_another_callback_set_stay_set(make_args: Any) -> None:
    control = TrainerControl(should_log=True, should_save=True, should_evaluate=True)
    args = make_args(save_strategy="no", logging_strategy="no")
    DefaultFlowCallback().on_step_end(args, TrainerState(max_steps=9), control)
    DefaultFlowCallback().on_epoch_end(args, TrainerState(max_steps=9), control)
    assert control == TrainerControl(should_log=True, should_save=True, should_evaluate=True)
