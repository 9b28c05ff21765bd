"""``from_torch`` runs classes of other packages unchanged."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params


@pytest.mark.parametrize("name", ["StableAdamW", "Adan", "Ranger"])
def test_bits_of_torch_optimi(name: str) -> None:
    cls = getattr(pytest.importorskip("optimi"), name)
    assert_equal_bits(
        ts.optim.from_torch(cls, lr=1e-2, triton=False),
        lambda p: cls(p, lr=1e-2, triton=False),
        rates=lambda step: 0.1 / (step + 1),
        missing=True,
        donate=True,
    )


@pytest.mark.parametrize("name", ["AdaBelief", "Lamb", "Prodigy"])
def test_bits_of_pytorch_optimizer(name: str) -> None:
    cls = getattr(pytest.importorskip("pytorch_optimizer"), name)
    assert_equal_bits(ts.optim.from_torch(cls), lambda p: cls(p))


def test_a_class_that_must_be_switched_to_training_comes_as_a_function() -> None:
    package = pytest.importorskip("schedulefree")

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = package.AdamWScheduleFree(params, **options)
        optimizer.train()
        return optimizer

    state = assert_equal_bits(
        ts.optim.from_torch(make, warmup_steps=3), lambda p: make(p, warmup_steps=3)
    )
    # Its running sums are numbers in the group: they belong to the state, which is serialised whole.
    whole = ts.TrainState(12, make_params(), {}, state, ts.rng.key(0))
    again = ts.serialize.from_flat(*ts.serialize.to_flat(whole))
    assert ts.equal(again, whole)
    assert again.opt_state["groups"][0]["k"] == 12
    optimizer, grads = ts.optim.from_torch(make, warmup_steps=3), make_grads(make_params(), 12)
    assert ts.equal(
        optimizer.apply(whole.params, grads, whole.opt_state),
        optimizer.apply(again.params, grads, again.opt_state),
    )
