"""PyTorch's samplers and our orders, each as the other."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, WeightedRandomSampler

from trainer.data.order import Permutation, Sequential
from trainer.data.torch_samplers import OrderSampler, SamplerOrder, as_order


def epoch_of(order: Any, epoch: int) -> list[int]:
    return order.indices(epoch, 0, len(order)).tolist()


class Drawing(Sampler[int]):
    """Shuffles by Python's and NumPy's global generators."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[int]:
        rows = list(range(6))
        random.shuffle(rows)
        np.random.shuffle(rows)  # noqa: NPY002
        return iter(rows)


def test_an_order_is_a_sampler() -> None:
    sampler = OrderSampler(Permutation(5, 3))
    assert list(sampler) == epoch_of(Permutation(5, 3), 0)
    sampler.set_epoch(2)
    assert list(sampler) == epoch_of(Permutation(5, 3), 2)
    assert len(sampler) == 5
    assert as_order(sampler, 5, 0) is sampler.order
    assert as_order(None, 4, 0) == Sequential(4)


@pytest.mark.parametrize(
    "make",
    [
        Drawing,
        lambda: RandomSampler(range(6)),
        lambda: WeightedRandomSampler([1.0, 2, 3, 4, 5, 6], 6),
        lambda: RandomSampler(range(6), generator=torch.Generator().manual_seed(4)),
    ],
    ids=["python", "torch", "weighted", "own-generator"],
)
def test_a_fresh_sampler_gives_the_same_epochs_again(make: Any) -> None:
    first = as_order(make(), 6, seed=7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    epochs = [epoch_of(first, epoch) for epoch in range(3)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert len({tuple(epoch) for epoch in epochs}) == 3

    torch.manual_seed(99)
    random.seed(99)
    resumed = as_order(make(), 6, seed=7)
    assert epoch_of(resumed, 2) == epochs[2]
    assert resumed.take(2, torch.tensor([4, 1])).tolist() == [epochs[2][4], epochs[2][1]]


def test_an_epoch_is_read_once() -> None:
    sampler = Drawing()
    passes = []
    read = Drawing.__iter__

    class Counted(Drawing):
        def __iter__(self) -> Iterator[int]:
            passes.append(1)
            return read(sampler)

    order = SamplerOrder(Counted(), 0)
    for start in range(6):
        order.indices(1, start, start + 1)
    assert len(passes) == 2  # that of epoch 0, which is passed over, and that of epoch 1


def test_a_sampler_with_epochs_is_told_and_makes_no_passes_in_vain() -> None:
    told = []

    class Epochs(Drawing):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    order = as_order(Epochs(), 6, 0)
    epoch_of(order, 5)
    epoch_of(order, 2)
    assert told == [5, 2]


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Lying(Drawing):
    def __len__(self) -> int:
        return 7


class Keys(Drawing):
    def __iter__(self) -> Iterator[Any]:
        return iter("abcdef")


def test_what_cannot_be_an_order_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Sampler with a __len__, got Endless. Its length is needed"
    ):
        as_order(Endless(), 3, 0)
    with pytest.raises(TypeError, match="Sampler with a __len__, got int"):
        as_order(3, 3, 0)
    with pytest.raises(
        ValueError, match="Lying has the length 7 but yields 6 samples; __len__ must"
    ):
        epoch_of(as_order(Lying(), 6, 0), 0)
    with pytest.raises(TypeError, match=r"Keys must yield sample indices \(int\)"):
        epoch_of(as_order(Keys(), 6, 0), 0)


def test_a_sampler_may_be_empty() -> None:
    order = SamplerOrder([], 0)
    assert len(order) == 0
    assert order._draw(0).tolist() == []
