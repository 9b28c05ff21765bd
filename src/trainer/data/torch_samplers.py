"""PyTorch's samplers and our orders, each as the other.

``Trainer._get_train_sampler`` and ``_get_eval_sampler`` return samplers, and may be overridden with any
``torch.utils.data.Sampler``. Loaders work with an `Order`, which tells what stands at a position.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.data.order import Order, Sequential, _Latest, _Materialised
from trainer.data.seeding import mix, preserved_host_rng, seed_host
from trainer.plan import length_of

# Separates a sampler's seeds from those of samples, whose index stays below.
_SAMPLER = (1 << 63) + 3


class OrderSampler(Sampler[int]):
    """An order as a sampler: iterating yields the samples of the epoch that was set."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.indices(self.epoch, 0, len(self.order)).tolist())


def as_order(sampler: Any, samples: int, seed: int) -> Order:
    """Return the order in which a sampler visits a dataset of ``samples`` samples.

    Args:
        sampler: ours, any other with a length, or None for the order of the data.
        samples: the length of the dataset.
        seed: the data seed of the run.

    Raises:
        TypeError: if it cannot be iterated over or has no length.
    """
    if sampler is None:
        return Sequential(samples)
    if isinstance(sampler, OrderSampler):
        return sampler.order
    if not hasattr(sampler, "__iter__") or length_of(sampler) is None:
        raise TypeError(
            f"expected a torch.utils.data.Sampler with a __len__, got {type(sampler).__name__}. Its "
            "length is needed to count batches and to go on after an interruption."
        )
    return SamplerOrder(sampler, seed)


@attrs.define(eq=False)
class SamplerOrder(_Materialised):
    """The order of a foreign sampler, an epoch of which is read at once (8 bytes a sample).

    What the sampler draws from the global generators of Python, NumPy and PyTorch is a function of
    (seed, epoch): they are seeded while it is read, and put back. A sampler with ``set_epoch`` is told the
    epoch. Any other may have a generator of its own, which moves on with each pass: if a run is
    resumed, the passes over earlier epochs are made first.
    """

    sampler: Any
    seed: int
    _passes: int = attrs.field(default=0, init=False)
    _latest: _Latest = attrs.field(factory=_Latest, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.sampler)

    def _draw(self, epoch: int) -> Tensor:
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        else:
            for earlier in range(self._passes, epoch):
                self._pass(earlier)
        self._passes = epoch + 1
        return self._pass(epoch)

    def _pass(self, epoch: int) -> Tensor:
        with preserved_host_rng():
            seed_host(mix(self.seed, _SAMPLER, epoch))
            try:
                indices = array("q", self.sampler)
            except TypeError as error:
                raise TypeError(
                    f"{type(self.sampler).__name__} must yield sample indices (int): {error}"
                ) from error
        if len(indices) != len(self):
            raise ValueError(
                f"{type(self.sampler).__name__} has the length {len(self)} but yields {len(indices)} "
                "samples; __len__ must be the number that one pass yields"
            )
        if not indices:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return torch.frombuffer(indices, dtype=torch.int64).clone()
