"""What a step does about a loss or gradients that are not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import models
from support.snapshots import untouched
from trainstep import guards

BAD = [float("nan"), float("inf"), -float("inf")]


def loss(call: Any, data: dict[str, Tensor]) -> Tensor:
    return models.mean_loss(call, data) * data["poison"]


def poisoned(value: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    return {**models.batch(seed=seed), "poison": torch.tensor(value)}


def make(on_nonfinite: Any, name: str = "batch_norm", **options: Any) -> tuple[Any, Any]:
    module = models.build(name)
    options.setdefault("optimizer", ts.optim.adamw(lr=0.02))
    step = ts.make_step(ts.module_loss(module, loss), on_nonfinite=on_nonfinite, **options)
    return step, step.init(module)


def without_count(state: ts.TrainState, step: int = 0) -> ts.TrainState:
    extras = {n: value for n, value in state.extras.items() if n != "skipped"}
    return state.evolve(step=step, extras=extras)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("optimizer", [ts.optim.adamw(), ts.optim.from_torch(torch.optim.AdamW)])
@pytest.mark.parametrize("value", BAD)
def test_skip_keeps_everything_and_counts(value: float, optimizer: Any, donate: bool) -> None:
    step, state = make("skip", optimizer=optimizer)
    state, _ = step(state, poisoned())
    expected = ts.tree.clone(state)
    chosen = ts.donate(step) if donate else step
    after, metrics = chosen(state, poisoned(value))
    assert ts.equal(without_count(after), without_count(expected))
    assert (after.step, after.extras["skipped"].item()) == (2, 1)
    assert not torch.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    after, metrics = chosen(after, poisoned())
    assert (after.step, after.extras["skipped"].item(), metrics["skipped"].item()) == (3, 1, 0)


def test_skip_changes_no_bit_of_a_good_step() -> None:
    step, state = make("skip")
    plain, start = make("ignore")
    for seed in range(4):
        state, metrics = step(state, poisoned(seed=seed))
        start, expected = plain(start, poisoned(seed=seed))
        assert ts.equal(without_count(state), without_count(start))
        assert torch.equal(metrics["grad_norm"], expected["grad_norm"])
    assert state.extras["skipped"] == 0


def test_skip_keeps_the_memory_of_transforms() -> None:
    def average(grads: Any, memory: Any, params: Any, context: Any) -> Any:
        return grads, {n: m + grads[n] for n, m in memory.items()}

    summing = ts.Transform("sum", average, lambda p: {n: torch.zeros_like(t) for n, t in p.items()})
    step, state = make("skip", transforms=(summing,))
    for start in (state, state.evolve(extras={})):  # as made by step.init, and by ts.init
        first, _ = step(start, poisoned(float("nan")))
        assert not any(m.any() for m in first.extras["transforms"][0].values())
        second, _ = step(first, poisoned())
        third, _ = step(second, poisoned(float("nan")))
        assert ts.equal(third.extras["transforms"], second.extras["transforms"])
        assert ts.tree.global_norm(second.extras["transforms"][0].values()) > 0
        assert third.extras["skipped"] == 2


def test_gradients_that_overflow_while_the_loss_is_finite_are_skipped() -> None:
    def steep(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss((params["w"] * batch).sqrt().sum())

    step = ts.make_step(steep, ts.optim.sgd(), on_nonfinite="skip")
    state = step.init({"w": torch.zeros(2)})
    after, metrics = step(state, torch.ones(2))
    assert metrics["loss"] == 0.0
    assert (after.extras["skipped"].item(), after.params["w"].tolist()) == (1, [0.0, 0.0])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("value", BAD)
def test_raise_names_step_and_values_and_leaves_the_state(value: float, donate: bool) -> None:
    step, state = make("raise")
    state, _ = step(state, poisoned())
    chosen = ts.donate(step) if donate else step
    text = r"step 1: loss is (nan|inf|-inf), gradient norm is .* Nothing was updated.*Lower the"
    with untouched(state), pytest.raises(FloatingPointError, match=text):
        chosen(state, poisoned(value))
    after, _ = chosen(state, poisoned())
    assert after.step == 2


def test_ignore_updates_all_the_same() -> None:
    step, state = make("ignore")
    after, metrics = step(state, poisoned(float("nan")))
    assert after.step == 1
    assert all(p.isnan().all() for p in after.params.values())
    assert "skipped" not in after.extras
    assert "skipped" not in metrics


def test_finite_looks_at_loss_and_norm() -> None:
    one = torch.tensor(1.0)
    assert guards.finite(ts.Loss(one), one)
    for value in BAD:
        bad = torch.tensor(value)
        assert not guards.finite(ts.Loss(bad), one)
        assert not guards.finite(ts.Loss(one), bad)


def test_the_count_survives_a_checkpoint() -> None:
    step, state = make("skip")
    state, _ = step(state, poisoned(float("nan")))
    again = ts.serialize.from_flat(*ts.serialize.to_flat(state))
    assert ts.digest(step(again, poisoned())[0]) == ts.digest(step(state, poisoned())[0])
    assert again.extras["skipped"] == 1
