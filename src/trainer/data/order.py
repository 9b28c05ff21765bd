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
_MULTINOMIAL_LIMIT = 1 << 24


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


def _weights(values: Any) -> Tensor:
    weights = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
    bad = weights.ndim != 1 or not bool(torch.isfinite(weights).all())
    if bad or bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError(
            "Weighted: weights must be a 1-D sequence of finite numbers of at least 0, one of them "
            f"above 0; got shape {tuple(weights.shape)}, {weights}."
        )
    if len(weights) > _MULTINOMIAL_LIMIT:
        raise ValueError(
            f"Weighted: torch.multinomial takes at most 2**24 weights, got {len(weights)}."
        )
    return weights


@attrs.frozen(eq=False)
class Weighted(_Materialised):
    """Samples drawn with probability proportional to ``weights``.

    Equal to ``torch.utils.data.WeightedRandomSampler`` with a generator seeded ``seed + epoch``.

    Args:
        weights: One number for each sample, at least 0; they need not sum to one.
        seed: Seed of the run's data order.
        replacement: False draws no sample twice in an epoch.
        num_samples: Draws an epoch; the number of weights by default.
    """

    weights: Tensor = attrs.field(converter=_weights)
    seed: int
    replacement: bool = True
    num_samples: int = attrs.field(validator=_at_least(0))
    _latest: _Latest = attrs.field(factory=_Latest, init=False, repr=False, eq=False)

    @num_samples.default
    def _all_samples(self) -> int:
        return len(self.weights)

    def __attrs_post_init__(self) -> None:
        available = int((self.weights > 0).sum())
        if not self.replacement and self.num_samples > available:
            raise ValueError(
                f"Weighted: without replacement at most {available} samples (those of a weight "
                f"above 0) can be drawn, got num_samples={self.num_samples}."
            )

    def __len__(self) -> int:
        return self.num_samples

    def _draw(self, epoch: int) -> Tensor:
        if self.num_samples == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        generator = _generator(self.seed, epoch)
        return torch.multinomial(
            self.weights, self.num_samples, self.replacement, generator=generator
        )


def _lengths(values: Any) -> Tensor:
    lengths = torch.as_tensor(values, device="cpu").to(torch.int64).clone()
    if lengths.ndim != 1:
        raise ValueError(
            "LengthGrouped: lengths must be 1-D, one number for each sample, got shape "
            f"{tuple(lengths.shape)}."
        )
    return lengths


@attrs.frozen(eq=False)
class LengthGrouped(_Materialised):
    """A shuffle in which samples of similar length stand together, so that batches pad little.

    A random permutation is cut into mega-batches of ``min(n // (4 * batch_size), 50)`` (at least 1)
    times ``batch_size`` samples, each sorted by descending length; the longest sample of all trades
    places with the first, so that running out of memory happens at once. This is the Hugging Face
    Trainer's ``group_by_length``, except that its permutation comes from the process's global
    generator and ours from one seeded ``seed + epoch``: ranks and resumed runs agree.

    Args:
        lengths: The length of each sample.
        batch_size: Samples a rank consumes in an update (micro-batch times accumulation).
        seed: Seed of the run's data order.
    """

    lengths: Tensor = attrs.field(converter=_lengths)
    batch_size: int = attrs.field(validator=_at_least(1))
    seed: int
    _latest: _Latest = attrs.field(factory=_Latest, init=False, repr=False, eq=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def _draw(self, epoch: int) -> Tensor:
        n = len(self.lengths)
        shuffled = torch.randperm(n, generator=_generator(self.seed, epoch), device="cpu")
        if n == 0:
            return shuffled
        size = self.batch_size * max(1, min(n // (4 * self.batch_size), 50))
        order = torch.cat([self._sorted(group) for group in shuffled.split(size)])
        longest = size * int(torch.argmax(self.lengths[order[::size]]))
        order[[0, longest]] = order[[longest, 0]]
        return order

    def _sorted(self, group: Tensor) -> Tensor:
        return group[torch.argsort(self.lengths[group], descending=True, stable=True)]


# One permutation is kept, so that asking for one position after another does not draw it anew.
_permutation = functools.lru_cache(maxsize=1)(Permutation)


def position(seed: int, n: int, i: int) -> int:
    """The sample at global position ``i`` of the default shuffle of ``n`` samples."""
    return _permutation(n, seed).position(i)


STRATEGIES = ("random", "sequential", "group_by_length", "feistel")


def for_strategy(
    strategy: str,
    n: int,
    *,
    seed: int,
    lengths: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
) -> Order:
    """The order that ``train_sampling_strategy`` names, over ``n`` samples.

    Args:
        strategy: One of `STRATEGIES`.
        n: Samples in the dataset.
        seed: ``data_seed``, or ``seed`` where that is None.
        lengths: The ``n`` sample lengths; needed by "group_by_length" only.
        batch_size: Samples a rank consumes in an update; needed by "group_by_length" only.

    Raises:
        ValueError: Unknown strategy, or "group_by_length" without what it needs.
    """
    if strategy == "random":
        return Permutation(n, seed)
    if strategy == "sequential":
        return Sequential(n)
    if strategy == "feistel":
        return Feistel(n, seed)
    if strategy != "group_by_length":
        raise ValueError(
            f"train_sampling_strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}."
        )
    if lengths is None or batch_size is None or len(lengths) != n:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' needs a batch size and one length for each "
            f"of the {n} samples, got batch_size={batch_size} and "
            f"{'no' if lengths is None else len(lengths)} lengths."
        )
    return LengthGrouped(lengths, batch_size, seed)
