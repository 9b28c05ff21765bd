"""Any split of a batch into micro-batches, ragged weights included, equals one batch."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import trainstep as ts
from strategies import LOSSES
from support import models

NAMES = ("mlp", "frozen", "tied", "gru", "lstm", "custom_function", "weight_norm")
SPLITS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def cut(data: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    pieces = {n: t.split(sizes) for n, t in data.items()}
    return [{n: pieces[n][i] for n in data} for i in range(len(sizes))]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert equality up to 1e-12 of each tensor's largest entry: sums may cancel."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        gap = (tensor - expected[name]).abs().max()
        assert gap <= 1e-12 * expected[name].abs().max().clamp_min(1e-3), name


@given(
    name=st.sampled_from(NAMES),
    sizes=SPLITS,
    loss=st.sampled_from(LOSSES),
    order=st.sampled_from(["sequential", "tree"]),
    data=st.data(),
)
def test_any_split_equals_one_batch(
    name: str, sizes: list[int], loss: Any, order: Any, data: st.DataObject
) -> None:
    module, n = models.build(name, torch.float64), sum(sizes)
    _, params, buffers = ts.functionalize(module)
    batch = models.batch(n, dtype=torch.float64)
    weights = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any))
    batch["w"] = torch.tensor(weights)
    loss_fn, key = ts.module_loss(module, loss), ts.rng.key(0)
    whole, expected = ts.value_and_grad(loss_fn)(params, buffers, batch, key)
    pieces = cut(batch, sizes)
    found, grads = ts.accumulate(loss_fn, params, buffers, pieces, key, order=order)
    assert_close(grads, expected)
    assert_close({"value": found.value}, {"value": whole.value.detach()})
    assert abs(float(found.weight) - float(whole.weight)) <= 1e-12 * float(whole.weight)


@given(
    power=st.integers(0, 3),
    size=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_parts_have_the_bits_of_dividing_each_loss(
    power: int, size: int, dtype: torch.dtype
) -> None:
    parts = 2**power  # division by a power of two is exact, so before or after the sum is the same
    module, plain = models.build("mlp", dtype), models.build("mlp", dtype)
    _, params, buffers = ts.functionalize(module)
    pieces = cut(models.batch(parts * size, dtype=dtype), [size] * parts)
    loss_fn = ts.module_loss(module, models.mean_loss)
    _, grads = ts.accumulate(loss_fn, params, buffers, pieces, ts.rng.key(0))
    for piece in pieces:
        (models.mean_loss(plain, piece) / parts).backward()
    assert ts.equal(grads, {n: p.grad for n, p in plain.named_parameters()})
