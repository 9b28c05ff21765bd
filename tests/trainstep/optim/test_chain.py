"""``chain``: transforms and the optimizer behind them, as one optimizer."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.optimizers import by_axes
from support.reference import make_grads, make_params
from support.snapshots import untouched
from trainstep import optim, transforms


def test_is_transforming_and_then_optimizing() -> None:
    clip, rule = transforms.clip_by_global_norm(0.5), optim.adamw()
    optimizer = optim.chain(clip, transforms.centralize(), rule)
    params = other = make_params()
    state, kept = optimizer.init(params), rule.init(params)
    for step in range(4):
        grads = make_grads(params, step)
        with untouched(params, grads, state):
            after, new = optimizer.apply(params, grads, state, {"lr": 0.1})
        clipped, _ = clip.update(grads, (), other)
        centred, _ = transforms.centralize().update(clipped, (), other)
        other, kept = rule.apply(other, centred, kept, {"lr": 0.1})
        assert ts.equal(after, other)
        params, state = after, new
    assert ts.equal(state["2_adamw"], kept)


def test_each_group_of_a_partition_is_clipped_by_itself() -> None:
    sgd = optim.sgd(lr=1.0)
    clipped = optim.chain(transforms.clip_by_global_norm(0.5), sgd)
    optimizer = optim.partition(by_axes, {"matrix": clipped, "rest": sgd})
    params = make_params()
    grads = make_grads(params, 0)
    after, _ = optimizer.apply(params, grads, optimizer.init(params))
    moves = [after[n] - params[n] for n in params if params[n].ndim > 1]
    torch.testing.assert_close(ts.tree.global_norm(moves), torch.tensor(0.5))
    assert torch.equal(after["scale"], params["scale"] - grads["scale"])


def test_noise_is_a_function_of_seed_count_and_place() -> None:
    params = {"w": torch.zeros(50)}
    grads = {"w": torch.zeros(50)}

    def noise(*places: int, seed: int = 0, steps: int = 1) -> torch.Tensor:
        parts = [
            transforms.add_noise(1.0, 0.0) if place in places else transforms.identity()
            for place in range(2)
        ]
        optimizer = optim.chain(*parts, optim.sgd(lr=1.0), seed=seed)
        new, state = params, optimizer.init(params)
        for _ in range(steps):
            before = new["w"]
            new, state = optimizer.apply(new, grads, state)
        return new["w"] - before

    assert torch.equal(noise(0), noise(0))
    assert noise(0).std() > 0.5
    different = [noise(0), noise(1), noise(0, seed=1), noise(0, steps=2)]
    assert all(not torch.equal(a, b) for a in different for b in different if a is not b)


def test_accumulation_holds_what_comes_after_it() -> None:
    def count(grads: Any, state: Any, params: Any, context: Any) -> Any:
        return grads, state + 1

    counter = ts.Transform("counter", count, lambda params: torch.zeros(()))
    optimizer = optim.chain(transforms.accumulate_every(2), counter, optim.sgd(lr=1.0))
    params = make_params(torch.float64)
    grads = [make_grads(params, step) for step in range(2)]
    held, state = optimizer.apply(params, grads[0], optimizer.init(params))
    assert ts.equal(held, params)
    assert state["1_counter"] == 0
    after, state = optimizer.apply(held, grads[1], state)
    assert state["1_counter"] == 1
    for n, p in params.items():
        torch.testing.assert_close(after[n], p - (grads[0][n] + grads[1][n]) / 2)


def test_several_optimizers_update_in_turn() -> None:
    first, second = optim.sgd(lr=1.0), optim.lion(lr=0.5)
    optimizer = optim.chain(first, transforms.clip_by_value(0.1), second)
    params = make_params()
    grads = make_grads(params, 0)
    after, state = optimizer.apply(params, grads, optimizer.init(params))
    once, _ = first.apply(params, grads, first.init(params))
    twice, kept = second.apply(
        once, {n: g.clamp(-0.1, 0.1) for n, g in grads.items()}, second.init(params)
    )
    assert ts.equal(after, twice)
    assert ts.equal(state["2_lion"], kept)
    assert optimizer.hyper == {}


def test_hyperparameters_are_the_optimizers_and_a_count_is_kept_where_asked_for() -> None:
    params = make_params()
    clipped = optim.chain(transforms.clip_by_value(1.0), optim.adamw(lr=0.5))
    assert clipped.hyper["lr"] == 0.5
    assert set(clipped.init(params)) == {"0_clip_by_value", "1_adamw"}
    noisy = optim.chain(transforms.add_noise(), optim.adamw())
    assert set(noisy.init(params)) == {"step", "0_add_noise", "1_adamw"}


def test_what_cannot_be_chained() -> None:
    with pytest.raises(ValueError, match="the last part must be an optimizer, got 0_adamw, 1_cen"):
        optim.chain(optim.adamw(), transforms.centralize())
    with pytest.raises(ValueError, match="the last part must be an optimizer, got nothing"):
        optim.chain()
    with pytest.raises(TypeError, match="must be a Transform or an Optimizer, got adamw"):
        optim.chain(optim.adamw)  # type: ignore[arg-type]
