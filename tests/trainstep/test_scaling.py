"""Dynamic loss scaling against ``torch.amp.GradScaler``, and against no scaling."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts

OPTIONS = {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
OVERFLOWS = {2, 3, 9, 17}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def loss_fn(call: Any, batch: Any) -> Tensor:
    return call(batch["x"]).square().mean()


def batch_of(index: int, *, overflow: bool = False) -> dict[str, Tensor]:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(index))
    return {"x": torch.full_like(x, math.inf) if overflow else x}


def batches(n: int = 24) -> list[dict[str, Tensor]]:
    return [batch_of(index, overflow=index in OVERFLOWS) for index in range(n)]


def make(scale: ts.DynamicScale | None = None, **options: Any) -> tuple[Any, ts.TrainState]:
    model = net()
    step = ts.make_step(
        ts.module_loss(model, loss_fn), ts.optim.sgd(lr=0.1), loss_scale=scale, **options
    )
    return step, step.init(model)


@pytest.mark.parametrize("growth", [2.0, 1.7])
def test_scales_and_parameters_are_those_of_grad_scaler(growth: float) -> None:
    options = {**OPTIONS, "growth_factor": growth}
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", **options)
    step, state = make(ts.DynamicScale(**options))
    scales = set()
    for index, batch in enumerate(batches()):
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        optimizer.zero_grad()
        scaler.scale(model(batch["x"]).square().mean()).backward()
        scaler.step(optimizer)
        assert float(step.loss_scale(state)) == scaler.get_scale()
        scaler.update()
        if index in OVERFLOWS:  # a skipped step leaves no trace in the buffers; the scaler's does
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
        state, metrics = step(state, batch)
        memory = state.extras["loss_scale"]
        assert memory["scale"].item() == scaler.get_scale()
        assert memory["growth"].item() == scaler._get_growth_tracker()
        assert metrics["skipped"].item() == (index in OVERFLOWS)
        assert ts.equal(state.params, dict(model.named_parameters()))
        scales.add(scaler.get_scale())
    assert len(scales) > 3
    assert state.extras["skipped"].item() == len(OVERFLOWS)


def test_the_scale_stops_growing_before_infinity() -> None:
    top = 2.0**127
    step, state = make(ts.DynamicScale(init_scale=top, growth_interval=1))
    memory = step.guards[0].init(state.params)
    calm = step.guards[0].judge(memory, ts.Loss(torch.tensor(1.0)), torch.tensor(1.0))
    assert calm.memory["scale"].item() == top


def test_a_power_of_two_changes_no_bit() -> None:
    plain, expected = make()
    scaled, state = make(ts.DynamicScale(**OPTIONS))
    for index in range(8):
        expected, wanted = plain(expected, batch_of(index))
        state, metrics = scaled(state, batch_of(index))
        assert {name: metrics[name] for name in wanted} == wanted
    assert ts.equal(state.params, expected.params)
    assert ts.equal(state.buffers, expected.buffers)
    assert state.extras["loss_scale"]["scale"].item() == 2.0**12


def test_a_skipped_step_keeps_everything_but_the_scale() -> None:
    step, state = make(ts.DynamicScale(**OPTIONS), transforms=(ts.transforms.accumulate_every(2),))
    state, _ = step(state, batch_of(0))
    after, metrics = step(state, batch_of(1, overflow=True))
    changed = {d.path for d in ts.diff(after, state)}
    assert changed == {
        "step",
        "extras/skipped",
        "extras/loss_scale/scale",
        "extras/loss_scale/growth",
    }
    assert metrics["loss_scale"].item() == OPTIONS["init_scale"]
    assert not metrics["grad_norm"].isfinite()


def test_pure_donated_and_restored_runs_are_equal() -> None:
    options = {"transforms": (ts.transforms.clip_by_global_norm(1.0),), "microbatches": 2}
    step, state = make(ts.DynamicScale(**OPTIONS), **options)
    donated, other = make(ts.DynamicScale(**OPTIONS), **options)
    donated = ts.donate(donated)
    for batch in batches():
        before = ts.digest(state)
        after, _ = step(state, batch)
        assert ts.digest(state) == before
        tensors, metadata = ts.serialize.to_flat(after)
        state = ts.serialize.from_flat(tensors, json.loads(json.dumps(metadata)))
        other, _ = donated(other, batch)
        assert ts.equal(state, other)


def test_float16_gradients_that_would_underflow_survive() -> None:
    # The gradient of the product is 1e-8, below the least float16, 6e-8.
    def tiny(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
        half = (params["w"].to(torch.float16) * batch).to(torch.float32)
        return ts.Loss(half * 1e-8, 1)

    params, batch = {"w": torch.tensor(1.0)}, torch.tensor(1.0, dtype=torch.float16)
    sgd = ts.optim.sgd(lr=1.0)
    plain = ts.make_step(tiny, sgd)
    scaled = ts.make_step(tiny, sgd, loss_scale=ts.DynamicScale())
    assert plain(plain.init(params), batch)[1]["grad_norm"] == 0
    norm = scaled(scaled.init(params), batch)[1]["grad_norm"]
    assert norm.item() == pytest.approx(1e-8, rel=1e-3)


def test_a_state_without_a_scale_gets_the_initial_one() -> None:
    step, full = make(ts.DynamicScale(**OPTIONS))
    bare = ts.init(net(), step.optimizer)
    for batch in batches(5):
        bare, _ = step(bare, batch)
        full, _ = step(full, batch)
    assert ts.equal(bare, full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale must be above 0 and finite, got 0.0"),
        ({"growth_factor": 1.0}, "growth_factor must be above 1, got 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor must be in (0, 1), got 1.0"),
        ({"growth_interval": 0}, "growth_interval must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ts.DynamicScale(**options)
    assert message in str(caught.value)


def test_raise_and_a_loss_scale_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="would stop at the first overflow"):
        make(ts.DynamicScale(), on_nonfinite="raise")
