"""Early stopping counts evaluations without improvement."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    TrainerControl,
    TrainerState,
)


@pytest.fixture
def stop_args(make_args: Any) -> Any:
    def build(**changes: Any) -> Any:
        defaults: dict[str, Any] = {
            "metric_for_best_model": "accuracy",
            "greater_is_better": True,
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
        }
        return make_args(**{**defaults, **changes})

    return build


def counters(callback: Any, args: Any, state: Any, control: Any, values: Any) -> list[Any]:
    """Report `values` in turn, update the best as the Trainer does, return what is counted."""
    seen = []
    for value in values:
        callback.on_evaluate(args, state, control, {"eval_accuracy": value})
        seen.append((callback.early_stopping_patience_counter, control.should_training_stop))
        best = state.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            state.best_metric = value
    return seen


@pytest.mark.row(118)
def test_it_stops_at_the_second_evaluation_without_improvement(stop_args: Any) -> None:
    seen = counters(
        EarlyStoppingCallback(2),
        stop_args(),
        TrainerState(),
        TrainerControl(),
        [0.5, 0.6, 0.55, 0.54],
    )
    assert seen == [(0, False), (0, False), (1, False), (2, True)]


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("patience", [1, 2])
def test_every_sequence_agrees_with_transformers(
    stop_args: Any, greater: bool, threshold: float, patience: int
) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    args = stop_args(greater_is_better=greater)
    values = (0.5, 0.55, 0.65, math.nan, math.inf)
    for sequence in itertools.product(values, repeat=4):
        ours = counters(
            EarlyStoppingCallback(patience, threshold),
            *(args, TrainerState(), TrainerControl(), sequence),
        )
        theirs = counters(
            peer.EarlyStoppingCallback(patience, threshold),
            *(args, peer.TrainerState(), peer.TrainerControl(), sequence),
        )
        assert ours == theirs, sequence


def test_the_name_may_have_its_prefix(stop_args: Any) -> None:
    args = stop_args(metric_for_best_model="eval_accuracy")
    seen = counters(
        EarlyStoppingCallback(), args, TrainerState(best_metric=1.0), TrainerControl(), [0.5]
    )
    assert seen == [(1, True)]


def test_no_threshold_may_be_none(stop_args: Any) -> None:
    seen = counters(
        EarlyStoppingCallback(9, None), stop_args(), TrainerState(), TrainerControl(), [1, 2, 2]
    )
    assert [count for count, _ in seen] == [0, 0, 1]


@pytest.mark.row(118)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"metric_for_best_model": None},
            r"needs a metric_for_best_model to watch, got None; set for instance",
        ),
        ({"eval_strategy": "no"}, r'needs an eval_strategy of "steps" or "epoch", got "no"'),
    ],
)
def test_what_it_needs_is_asserted(stop_args: Any, change: dict[str, Any], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        EarlyStoppingCallback().on_train_begin(
            stop_args(**change), TrainerState(), TrainerControl()
        )


@pytest.mark.parametrize("loads_best", [True, False])
def test_not_loading_the_best_model_is_warned_of(
    stop_args: Any, caplog: pytest.LogCaptureFixture, loads_best: bool
) -> None:
    args = stop_args(load_best_model_at_end=loads_best)
    EarlyStoppingCallback().on_train_begin(args, TrainerState(), TrainerControl())
    assert ("without load_best_model_at_end=True" in caplog.text) is not loads_best


def test_a_missing_metric_is_warned_of_and_not_counted(
    stop_args: Any, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EarlyStoppingCallback()
    metrics = {"eval_loss": 1.0, "eval_runtime": 2.0}
    control = TrainerControl()
    callback.on_evaluate(stop_args(), TrainerState(best_metric=1.0), control, metrics)
    assert callback.early_stopping_patience_counter == 0
    assert not control.should_training_stop
    assert "needs 'eval_accuracy'" in caplog.text
    assert "it has: eval_loss, eval_runtime" in caplog.text


def test_evaluation_sets_that_do_not_hold_the_metric_are_passed_over(
    stop_args: Any, caplog: pytest.LogCaptureFixture
) -> None:
    args = stop_args(metric_for_best_model="eval_news_accuracy")
    callback, state = EarlyStoppingCallback(), TrainerState(best_metric=1.0)
    books = {"eval_books_accuracy": 0.5, "eval_books_runtime": 2.0}
    callback.on_evaluate(args, state, TrainerControl(), books)
    assert (callback.early_stopping_patience_counter, caplog.messages) == (0, [])
    news = {"eval_news_loss": 0.5, "eval_news_runtime": 2.0}
    callback.on_evaluate(args, state, TrainerControl(), news)
    assert "needs 'eval_news_accuracy'" in caplog.text
    callback.on_evaluate(args, state, TrainerControl(), {**news, "eval_news_accuracy": 0.5})
    assert callback.early_stopping_patience_counter == 1


def test_it_ends_a_training(stop_args: Any, run_loop: Any) -> None:
    handler = CallbackHandler(
        [DefaultFlowCallback, EarlyStoppingCallback(2)], None, None, None, None
    )
    state = TrainerState(best_metric=1.0)
    run_loop(
        *(handler, stop_args(), state, TrainerControl()),
        batches=3,
        window=1,
        epochs=5,
        metrics=[{"eval_accuracy": 0.5}],
    )
    assert state.global_step == 6


def test_its_state_holds_settings_and_counter() -> None:
    callback = EarlyStoppingCallback(3, 0.5)
    callback.early_stopping_patience_counter = 2
    assert callback.state() == {
        "args": {"early_stopping_patience": 3, "early_stopping_threshold": 0.5},
        "attributes": {"early_stopping_patience_counter": 2},
    }
    assert vars(EarlyStoppingCallback.from_state(callback.state())) == vars(callback)
