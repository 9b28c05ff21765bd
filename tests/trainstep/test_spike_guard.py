"""The loss-spike guard: what it lets through, what it remembers, and that it never asks the host."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainstep as ts

WINDOW = 8


def level(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
    """Return a loss that the batch dictates, with a gradient of the same size."""
    return ts.Loss(batch * (1 + (params["w"] - params["w"].detach())), 1)


def make(guard: Any, **options: Any) -> tuple[Any, ts.TrainState]:
    step = ts.make_step(level, ts.optim.adamw(lr=0.1), guards=(guard,), **options)
    return step, step.init({"w": torch.tensor(1.0)})


def losses(*tail: float, seed: int = 0) -> list[Tensor]:
    """Return a full window of losses near 1, then the tail."""
    noise = torch.randn(WINDOW, generator=torch.Generator().manual_seed(seed)) * 0.01
    return [*(1 + noise), *(torch.tensor(value) for value in tail)]


def run(step: Any, state: Any, batches: list[Tensor]) -> tuple[ts.TrainState, list[int]]:
    skipped = []
    for batch in batches:
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped"]))
    return state, skipped


def test_a_spike_is_skipped_and_nothing_else() -> None:
    step, state = make(ts.spike_guard(WINDOW, 4.0))
    state, skipped = run(step, state, losses(1.0))
    assert skipped == [0] * (WINDOW + 1)
    after, metrics = step(state, torch.tensor(3.0))
    assert metrics["skipped"] == 1
    assert {d.path for d in ts.diff(after, state)} == {
        "step",
        "extras/skipped",
        "extras/spike/losses",
        "extras/spike/count",
    }


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_the_threshold_is_mean_plus_sigma_deviations(sigma: float) -> None:
    step, state = make(ts.spike_guard(WINDOW, sigma))
    state, _ = run(step, state, losses())
    window = torch.stack(losses()).double()
    threshold = float(window.mean() + sigma * window.std(correction=0))
    assert run(step, state, [torch.tensor(threshold - 1e-5)])[1] == [0]
    assert run(step, state, [torch.tensor(threshold + 1e-5)])[1] == [1]


def test_the_window_is_the_last_losses_in_a_ring() -> None:
    step, state = make(ts.spike_guard(4, 1e6))
    state, _ = run(step, state, [torch.tensor(float(i)) for i in range(1, 7)])
    assert state.extras["spike"]["losses"].tolist() == [5.0, 6.0, 3.0, 4.0]
    assert state.extras["spike"]["count"].item() == 6


def test_nothing_is_judged_before_the_window_is_full() -> None:
    step, state = make(ts.spike_guard(WINDOW, 1.0))
    _, skipped = run(step, state, [torch.tensor(10.0**i) for i in range(WINDOW)])
    assert skipped == [0] * WINDOW


def test_equal_losses_are_no_spike() -> None:
    step, state = make(ts.spike_guard(WINDOW, 1.0))
    assert sum(run(step, state, [torch.tensor(0.1)] * 3 * WINDOW)[1]) == 0


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("window", [10, 40])
def test_a_new_level_is_accepted_soon(window: int, sigma: float) -> None:
    step, state = make(ts.spike_guard(window, sigma))
    batches = [torch.tensor(1.0)] * window + [torch.tensor(5.0)] * window
    _, skipped = run(step, state, batches)
    assert 1 <= sum(skipped) <= window / (1 + sigma**2) + 1
    assert skipped[-1] == 0


def test_losses_that_are_not_finite_are_skipped_and_not_remembered() -> None:
    step, state = make(ts.spike_guard(WINDOW, 4.0))
    state, _ = run(step, state, losses())
    after, skipped = run(step, state, [torch.tensor(math.nan), torch.tensor(math.inf)])
    assert skipped == [1, 1]
    assert ts.equal(after.extras["spike"], state.extras["spike"])
    assert ts.equal(after.params, state.params)


def test_clipping_shrinks_the_gradient_of_a_spike_only() -> None:
    guard = ts.spike_guard(WINDOW, 2.0, action="clip")
    seen: list[float] = []

    def spy(grads: Any, state: Any, params: Any, context: Any) -> Any:
        seen.append(float(grads["w"]))
        return grads, state

    step, state = make(guard, transforms=(ts.Transform("spy", spy),))
    batches = losses(1.0, 3.0)
    for batch in batches:
        state, metrics = step(state, batch)
    assert "skipped" not in metrics
    assert seen[:-1] == [float(batch) for batch in batches[:-1]]
    window = torch.stack(batches[1:-1]).double()
    room = 2.0 * window.std(correction=0)
    assert seen[-1] == pytest.approx(3.0 * float(room / (3.0 - window.mean())), rel=1e-4)
    assert metrics["grad_norm"].item() == 3.0


def test_clipping_leaves_steps_without_a_finite_loss_to_other_guards() -> None:
    guard = ts.spike_guard(2, 1.0, action="clip")
    memory = guard.init({"w": torch.tensor(1.0)})
    for value in (1.0, 2.0):
        memory = guard.judge(memory, ts.Loss(torch.tensor(value)), torch.tensor(1.0)).memory
    for value in (math.inf, math.nan):
        verdict = guard.judge(memory, ts.Loss(torch.tensor(value)), torch.tensor(1.0))
        assert verdict.factor is not None
        assert verdict.factor.item() == 1.0


@pytest.mark.parametrize("action", ["skip", "clip"])
@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip"])
def test_pure_donated_and_restored_runs_are_equal(action: Any, on_nonfinite: Any) -> None:
    options = {"transforms": (ts.transforms.clip_by_value(2.0),), "on_nonfinite": on_nonfinite}
    step, state = make(ts.spike_guard(WINDOW, 2.0, action=action), **options)
    donated, other = make(ts.spike_guard(WINDOW, 2.0, action=action), **options)
    donated = ts.donate(donated)
    for batch in losses(5.0, 1.0, 7.0, 1.0):
        before = ts.digest(state)
        after, _ = step(state, batch)
        assert ts.digest(state) == before
        tensors, metadata = ts.serialize.to_flat(after)
        state = ts.serialize.from_flat(tensors, json.loads(json.dumps(metadata)))
        other, _ = donated(other, batch)
        assert ts.equal(state, other)


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read from a tensor, which on a device would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("donated", [False, True])
def test_guards_never_ask_the_host(donated: bool) -> None:
    with pytest.raises(AssertionError, match="a host sync"), NoHostReads():
        bool(torch.tensor(1.0) > 0)
    step, state = make(
        ts.spike_guard(2, 1.0),
        loss_scale=ts.DynamicScale(),
        on_nonfinite="skip",
        transforms=(ts.transforms.accumulate_every(2), ts.transforms.clip_by_global_norm(1.0)),
    )
    state, _ = step(state, torch.tensor(1.0))
    if donated:
        step = ts.donate(step)
    batches = [torch.tensor(value) for value in (1.0, 2.0, math.nan, 9.0, 1.0)]
    with NoHostReads():
        for batch in batches:
            state, metrics = step(state, batch)
    assert state.extras["skipped"].item() >= 2
    assert set(metrics) >= {"loss", "skipped", "loss_scale"}


def test_guards_need_names_of_their_own() -> None:
    guards = (ts.spike_guard(8), ts.spike_guard(100))
    with pytest.raises(ValueError, match=r"differ from each other .* got spike, spike"):
        ts.make_step(level, ts.optim.sgd(), guards=guards)
    with pytest.raises(ValueError, match="got skipped"):
        ts.make_step(level, ts.optim.sgd(), guards=(ts.spike_guard(8, name="skipped"),))
    named = (ts.spike_guard(8), ts.spike_guard(100, name="slow"))
    step = ts.make_step(level, ts.optim.sgd(), guards=named)
    assert {"spike", "slow"} < step.init({"w": torch.tensor(1.0)}).extras.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"action": "warn"}, 'action must be "skip" or "clip", got \'warn\''),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ts.spike_guard(**options)
    assert message in str(caught.value)
