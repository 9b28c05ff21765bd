"""Mistakes that everybody makes once are explained, not left to an AttributeError inside."""

import functools
from typing import Any

import pytest

import trainstep as ts
from support import models


def make() -> tuple[Any, Any]:
    module = models.build("mlp")
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw(0.1))
    return step, step.init(module)


KINDS = [
    lambda step: step,
    ts.donate,
    ts.data_parallel,
    lambda step: ts.compile(step, whole=True, backend="eager"),
]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "donated", "parallel", "whole"])
def test_what_is_no_state_is_explained(kind: Any) -> None:
    step, state = make()
    step, batch = kind(step), models.batch()
    with pytest.raises(TypeError, match=r"got dict; the state comes before the batch"):
        step(batch, state)
    with pytest.raises(TypeError, match=r"got Sequential; make one with step\.init\(model\)"):
        step(models.build("mlp"), batch)
    with pytest.raises(TypeError, match=r"got tuple; .*state, metrics = step\(state, batch\)"):
        step(step(state, batch), batch)


def test_a_state_that_was_consumed_still_says_so() -> None:
    step, state = make()
    step = ts.donate(step)
    step(state, models.batch())
    with pytest.raises(RuntimeError, match="donated at step 0"):
        step(state, models.batch())


def bare(call: Any, batch: Any) -> Any:
    return models.mean_loss(call, batch)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            bare,
            r"got the function bare, which takes \(call.*, batch.*module_loss\(model, function\)",
        ),
        (lambda call, batch: 0, r"got the function <lambda>, which takes \(call, batch\)"),
        (
            models.build("mlp"),
            r"got Sequential, which takes \(.*; make one of it with trainstep\.module_loss",
        ),
        (None, r"got NoneType; see trainstep\.module_loss"),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused_when_the_step_is_made(
    loss: Any, text: str
) -> None:
    with pytest.raises(TypeError, match=rf"loss_fn\(params, buffers, batch, key\), {text}"):
        ts.make_step(loss, ts.optim.sgd(0.1))


class Called:
    def __call__(
        self, params: Any, buffers: Any, batch: Any, key: Any, *, train: bool = True
    ) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    "loss", [Called(), functools.partial(Called(), train=False), lambda *args: None, max]
)
def test_losses_that_may_be_right_are_taken(loss: Any) -> None:
    assert ts.make_step(loss, ts.optim.sgd(0.1)).loss_fn is loss
