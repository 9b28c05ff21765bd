"""A state back into a module, and on another device."""

from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support import models
from support.snapshots import untouched


def trained(name: str, **options: Any) -> tuple[nn.Module, ts.TrainState]:
    module = models.build(name)
    options.setdefault("optimizer", ts.optim.adamw(lr=0.1))
    step = ts.make_step(ts.module_loss(module, models.mean_loss), **options)
    return module, step(step.init(module), models.batch())[0]


@pytest.mark.parametrize("name", models.MODELS)
def test_the_module_then_computes_what_the_state_does(name: str) -> None:
    module, state = trained(name)
    apply, _, _ = ts.functionalize(module)
    x = models.batch()["x"]
    expected, _ = apply(state.params, state.buffers, x, train=False)
    objects = {n: id(p) for n, p in (*module.named_parameters(), *module.named_buffers())}
    with untouched(state):
        assert ts.load_into(module, state) is module
    assert {n: id(p) for n, p in (*module.named_parameters(), *module.named_buffers())} == objects
    _, params, buffers = ts.functionalize(module)
    assert ts.equal((params, buffers), (state.params, state.buffers))
    # Recurrent modules use another kernel for parameters that require gradients.
    assert torch.equal(module.requires_grad_(False).eval()(x), expected)


def test_a_state_dict_makes_the_way_back() -> None:
    module, state = trained("tied")
    saved = ts.load_into(module, state).state_dict()
    other = models.build("tied", seed=5)
    other.load_state_dict(saved)
    assert torch.equal(other.head.weight, state.params["embedding.weight"])
    assert other.head.weight is other.embedding.weight


def test_frozen_parameters_are_written_whatever_the_module_freezes() -> None:
    _, state = trained("frozen")
    other = models.build("mlp", seed=5)
    ts.load_into(other, state)
    assert torch.equal(other[0].weight, state.buffers["0.weight"])
    assert other[0].weight.requires_grad


def test_parameters_alone_leave_the_buffers_or_bring_theirs() -> None:
    module, state = trained("batch_norm", optimizer=ts.optim.ema(ts.optim.adamw(lr=0.1)))
    average = ts.optim.ema_params(state)
    ts.load_into(module, average)
    assert torch.equal(module[0].weight, average["0.weight"])
    assert int(module[1].num_batches_tracked) == 0
    ts.load_into(module, average, state.buffers)
    assert int(module[1].num_batches_tracked) == 1


def test_values_take_the_dtype_of_the_module() -> None:
    _, state = trained("mlp")
    half = ts.load_into(models.build("mlp", torch.bfloat16), state)
    assert torch.equal(half[0].weight, state.params["0.weight"].bfloat16())


def test_what_does_not_fit_is_listed_and_nothing_is_written() -> None:
    module, state = trained("batch_norm")
    params = {n: p for n, p in state.params.items() if n != "2.bias"}
    params |= {"0.bias": torch.zeros(9), "head": torch.zeros(1)}
    with untouched(module), pytest.raises(ValueError, match="do not fit Sequential") as caught:
        ts.load_into(module, params, {})
    lines = str(caught.value).splitlines()
    assert "  missing: 2.bias" in lines
    assert "  missing: 1.running_mean" in lines
    assert "  unexpected: head" in lines
    assert "  differs: 0.bias has shape (9,), the module's (6,)" in lines
    with pytest.raises(ValueError, match=r"vmap\.unstack\(state\)"):
        ts.load_into(module, ts.vmap.stack([state, state]))
    with pytest.raises(ValueError, match=r"load_into\(module, state\.params, buffers\)"):
        ts.load_into(module, state, state.buffers)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        ts.load_into({}, state)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [ts.optim.adamw(), ts.optim.from_torch(torch.optim.NAdam)])
def test_every_tensor_moves_and_other_leaves_stay(optimizer: ts.Optimizer) -> None:
    _, state = trained("batch_norm", optimizer=optimizer)
    there = ts.to_device(state, "meta")
    assert (there.step, there.key) == (1, state.key)
    before, after = ts.tree.leaves(state), ts.tree.leaves(there)
    for old, new in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor):
            assert new.is_meta
        else:
            assert new is old
    same = ts.to_device(state, torch.device("cpu"))
    assert all(a is b for a, b in zip(ts.tree.leaves(same), before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "optimizer",
    [
        ts.optim.adamw(),
        ts.optim.adamw(fused=False),
        ts.optim.nadam(),
        ts.optim.scheduled(ts.optim.sgd(momentum=0.9), ts.schedules.constant(0.1)),
        ts.optim.from_torch(torch.optim.Adam),
        ts.optim.from_torch(torch.optim.NAdam),
    ],
)
def test_a_state_trains_on_after_it_moved(optimizer: ts.Optimizer) -> None:
    module = models.build("mlp")
    step = ts.make_step(ts.module_loss(module, models.mean_loss), optimizer, on_nonfinite="skip")
    state, _ = step(step.init(module), models.batch())
    here, _ = step(state, models.batch(seed=1))
    there, _ = step(ts.to_device(state, "cuda"), ts.to_device(models.batch(seed=1), "cuda"))
    for name, param in here.params.items():
        torch.testing.assert_close(there.params[name].cpu(), param, rtol=1e-4, atol=1e-4)
