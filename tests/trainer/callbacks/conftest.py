"""A training loop without a model: it fires the events in the documented order."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_args() -> Callable[..., SimpleNamespace]:
    """Return a function that builds arguments with the defaults of TrainingArguments."""

    def build(**changes: Any) -> SimpleNamespace:
        defaults: dict[str, Any] = {
            "logging_strategy": "steps",
            "logging_first_step": False,
            "logging_steps": 500,
            "eval_strategy": "no",
            "eval_steps": None,
            "eval_delay": 0,
            "save_strategy": "steps",
            "save_steps": 500,
            "metric_for_best_model": None,
            "greater_is_better": None,
            "load_best_model_at_end": False,
        }
        return SimpleNamespace(**{**defaults, **changes})

    return build


@pytest.fixture
def run_loop() -> Callable[..., Any]:
    return _run_loop


def _run_loop(
    handler: Any,
    args: Any,
    state: Any,
    control: Any,
    *,
    batches: int,
    window: int,
    epochs: int,
    eval_batches: int = 2,
    metrics: Sequence[dict[str, Any]] = ({"eval_loss": 1.0},),
) -> Any:
    """Fire the events of a training; return the control object that is left at its end."""
    state.compute_steps(args, math.ceil(batches / window) * epochs)
    state.max_steps = math.ceil(batches / window) * epochs
    last_logged = 0

    def act(control: Any) -> Any:
        nonlocal last_logged
        if control.should_log and state.global_step > last_logged:
            control = log({"loss": 0.5}, control)
            last_logged = state.global_step
        if control.should_evaluate:
            for entry in metrics:
                for _ in range(eval_batches):
                    control = handler.on_prediction_step(args, state, control)
                control = log(dict(entry), control)
                control = handler.on_evaluate(args, state, control, dict(entry))
        if control.should_save:
            control = handler.on_save(args, state, control)
        return control

    def log(record: dict[str, Any], control: Any) -> Any:
        record["epoch"] = state.epoch
        state.log_history.append({**record, "step": state.global_step})
        return handler.on_log(args, state, control, record)

    control = handler.on_init_end(args, state, control)
    control = handler.on_train_begin(args, state, control)
    for epoch in range(epochs):
        control = handler.on_epoch_begin(args, state, control)
        for batch in range(batches):
            if batch % window == 0:
                control = handler.on_step_begin(args, state, control)
            if (batch + 1) % window == 0 or batch + 1 == batches:
                control = handler.on_pre_optimizer_step(args, state, control)
                control = handler.on_optimizer_step(args, state, control)
                state.global_step += 1
                state.epoch = epoch + (batch + 1) / batches
                control = act(handler.on_step_end(args, state, control))
            else:
                control = handler.on_substep_end(args, state, control)
            if control.should_epoch_stop or control.should_training_stop:
                break
        control = act(handler.on_epoch_end(args, state, control))
        if control.should_training_stop:
            break
    control = log({"train_loss": 0.5}, control)
    return handler.on_train_end(args, state, control)
