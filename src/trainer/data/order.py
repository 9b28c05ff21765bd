"""Data order as a pure function: which sample stands at which position of which epoch.

An `Order` has n samples an epoch. The sample at global position ``i`` is that at ``i % n`` of epoch
``i // n``; it depends on the order's fields and nothing else: no global generator, no history, no
worker, no rank. Seeking is therefore a subtraction, and resuming reads no sample twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor

from trainer.data.seeding import mix, splitmix64

_FEISTEL_LIMIT = 1 << 40
_FEISTEL_ROUNDS = 8


class Order(Protocol):
    """What the sampler needs of a data order. Index tensors are int64, 1-D, on the CPU."""

    def __len__(self) -> int:
        """Samples an epoch."""

    def take(self, epoch: int, positions: Tensor) -> Tensor:
        """The samples at ``positions`` (int64, each in [0, n)) of ``epoch``."""

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """The samples at positions start..stop-1 of ``epoch``."""

    def position(self, i: int) -> int:
        """The sample at global position ``i``, counted over epochs."""


class _Indexing:
    """`indices`, `position` and the range checks, over ``_take`` of a subclass."""

    __slots__ = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def _take(self, epoch: int, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def take(self, epoch: int, positions: Tensor) -> Tensor:
        if epoch < 0:
            raise ValueError(f"{type(self).__name__}: epoch must be at least 0, got {epoch}.")
        if positions.numel() == 0:
            return positions.to(torch.int64)
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= len(self):
            raise IndexError(
                f"{type(self).__name__}: positions of an epoch lie in [0, {len(self)}), "
                f"got {low}..{high}."
            )
        return self._take(epoch, positions)

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        if start > stop:
            raise IndexError(
                f"{type(self).__name__}.indices: start must not exceed stop, got {start}..{stop}."
            )
        return self.take(epoch, torch.arange(start, stop, device="cpu"))

    def position(self, i: int) -> int:
        n = len(self)
        if i < 0 or n == 0:
            raise IndexError(
                f"{type(self).__name__}.position: expected a position of at least 0 and a dataset "
                f"that is not empty, got position {i} of {n} samples."
            )
        return int(self.take(i // n, torch.tensor([i % n], device="cpu"))[0])


class _Latest:
    """Remembers the index tensor of one epoch; copies and pickles start empty."""

    __slots__ = ("epoch", "values")

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.values = torch.empty(0, dtype=torch.int64, device="cpu")

    def __reduce__(self) -> tuple[type[_Latest], tuple[()]]:
        return (_Latest, ())


class _Materialised(_Indexing):
    """An order whose whole epoch is drawn at once, and kept until another epoch is asked for."""

    __slots__ = ()
    _latest: _Latest

    def _draw(self, epoch: int) -> Tensor:
        raise NotImplementedError

    def _take(self, epoch: int, positions: Tensor) -> Tensor:
        if self._latest.epoch != epoch:
            self._latest.values = self._draw(epoch)
            self._latest.epoch = epoch
        return self._latest.values[positions]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed + epoch)


def _at_least(bound: int) -> Callable[[Any, attrs.Attribute[int], int], None]:
    def check(record: Any, attribute: attrs.Attribute[int], value: int) -> None:
        if not isinstance(value, int) or value < bound:
            raise ValueError(
                f"{type(record).__name__}: {attribute.name} must be an integer of at least "
                f"{bound}, got {value!r}."
            )

    return check


@attrs.frozen
class Sequential(_Indexing):
    """Samples 0..n-1 in this order, every epoch."""

    n: int = attrs.field(validator=_at_least(0))

    def __len__(self) -> int:
        return self.n

    def _take(self, epoch: int, positions: Tensor) -> Tensor:
        return positions.to(torch.int64)


@attrs.frozen
class Permutation(_Materialised):
    """The default shuffle: ``torch.randperm(n)`` from a generator seeded with ``seed + epoch``.

    This is the order that accelerate's seedable sampler gives the Hugging Face Trainer. It holds 8n
    bytes; beyond some 10**8 samples prefer `Feistel`.
    """

    n: int = attrs.field(validator=_at_least(0))
    seed: int
    _latest: _Latest = attrs.field(factory=_Latest, init=False, repr=False, eq=False)

    def __len__(self) -> int:
        return self.n

    def _draw(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=_generator(self.seed, epoch), device="cpu")


@attrs.frozen
class Feistel(_Indexing):
    """A shuffle in O(1) memory, and O(1) time per position, for n up to 2**40.

    Positions of b = ceil(log2 n) bits are split into two parts; in each of 8 rounds one part is
    XORed with a keyed hash of the other, a bijection of [0, 2**b) (Luby and Rackoff, 1988). Results
    of n or more are passed through again until they fall below n ("cycle walking", Black and
    Rogaway, 2002), which keeps it a bijection; as 2**b < 2n, that takes fewer than two passes on
    average. Round keys are hashes of (seed, epoch, round).
    """

    n: int = attrs.field(validator=_at_least(0))
    seed: int

    def __attrs_post_init__(self) -> None:
        if self.n > _FEISTEL_LIMIT:
            raise ValueError(f"Feistel: n must be at most 2**40 = {_FEISTEL_LIMIT}, got {self.n}.")

    def __len__(self) -> int:
        return self.n

    def _take(self, epoch: int, positions: Tensor) -> Tensor:
        keys = [mix(self.seed, epoch, round_) for round_ in range(_FEISTEL_ROUNDS)]
        values = self._pass(positions.numpy().astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._pass(values[outside], keys)
            outside = outside[values[outside] >= self.n]
        return torch.from_numpy(values.astype(np.int64))

    def _pass(self, values: np.ndarray, keys: Sequence[int]) -> np.ndarray:
        """One pass of all rounds over uint64 ``values`` below 2**b."""
        bits = max(2, (self.n - 1).bit_length())
        low_bits = np.uint64(bits // 2)
        low_mask = np.uint64((1 << (bits // 2)) - 1)
        high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        high, low = values >> low_bits, values & low_mask
        for number, key in enumerate(keys):
            if number % 2:
                low = low ^ (splitmix64(high ^ np.uint64(key)) & low_mask)
            else:
                high = high ^ (splitmix64(low ^ np.uint64(key)) & high_mask)
        return (high << low_bits) | low


# One permutation is kept, so that asking for one position after another does not draw it anew.
_permutation = functools.lru_cache(maxsize=1)(Permutation)


def position(seed: int, n: int, i: int) -> int:
    """The sample at global position ``i`` of the default shuffle of ``n`` samples."""
    return _permutation(n, seed).position(i)
