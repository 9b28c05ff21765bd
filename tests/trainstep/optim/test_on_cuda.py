"""On a GPU: the bits of PyTorch's multi-tensor classes, donation, and updates without a host sync."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.optimizers import OPTIMIZERS, hyper_for
from support.reference import make_grads, make_params
from trainstep import optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Pair = tuple[Callable[..., ts.Optimizer], Callable[..., torch.optim.Optimizer], dict[str, Any]]

PAIRS: dict[str, Pair] = {
    "rmsprop": (optim.rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (optim.adagrad, torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "nadam": (optim.nadam, torch.optim.NAdam, {"weight_decay": 0.1}),
    "radam": (optim.radam, torch.optim.RAdam, {"weight_decay": 0.1}),
    "adafactor": (optim.adafactor, torch.optim.Adafactor, {"weight_decay": 0.1}),
    "muon": (optim.muon, torch.optim.Muon, {}),
}


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.cuda() for n, t in tensors.items()}


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_bits_of_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs, options = PAIRS[name]
    start = make_params(dtype)
    if name == "muon":
        start = {n: p for n, p in start.items() if p.ndim == 2}
    optimizer, params = ours(**options), on_gpu(start)
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    reference = theirs(
        list(leaves.values()), **options, **({} if name == "muon" else {"foreach": True})
    )
    state = optimizer.init(params)
    for step in range(12):
        grads = on_gpu(make_grads(start, step))
        for n, leaf in leaves.items():
            leaf.grad = grads[n].clone()
        reference.step()
        with no_sync():
            params, state = optimizer.apply(params, grads, state)
        assert ts.equal(params, {n: leaf.detach() for n, leaf in leaves.items()}), f"step {step}"


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if not n.startswith("from_torch")])
def test_no_update_waits_for_the_device(name: str, donate: bool) -> None:
    optimizer, start = OPTIMIZERS[name](), make_params()
    params, batches = on_gpu(start), [on_gpu(make_grads(start, step)) for step in range(4)]
    state = optimizer.init(params)
    with no_sync():
        for grads in batches:
            params, state = optimizer.apply(params, grads, state, hyper_for(optimizer), donate)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adagrad", "lion", "scaled"])
def test_a_rate_on_the_device_is_not_read(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), on_gpu(make_params())
    grads, state = on_gpu(make_grads(make_params(), 0)), optimizer.init(params)
    rate = torch.tensor(1e-2, device="cuda")
    with no_sync():
        after, _ = optimizer.apply(params, grads, state, {"lr": rate})
    expected, _ = optimizer.apply(params, grads, state, {"lr": 1e-2})
    torch.testing.assert_close(after, expected)
