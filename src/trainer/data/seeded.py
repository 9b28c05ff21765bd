"""Per-sample seeding: the randomness of data is a function of (seed, epoch, sample).

Augmentations and collators draw from the global generators of Python, NumPy and PyTorch. Left
alone, what they draw depends on how many workers there are, how far these prefetch, and where a run
was resumed. Here the three generators are seeded from ``mix(seed, epoch, index)`` before a sample is
fetched, and from the position of a batch before it is collated, so the same sample in the same epoch
is always the same bits.

It costs the three calls that seed, for each sample. A dataset or collator that draws nothing can say so
by an attribute ``deterministic = True`` and is left alone then; see ``trainer.data.loader``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch.utils.data import Dataset, IterableDataset

from trainer.data.collators.positioned import PositionedCollator
from trainer.data.sampler import BatchKeys
from trainer.data.seeding import (
    COLLATE,
    MASK64,
    has_transform,
    lent_host_rng,
    mix,
    seed_host,
    splitmix64,
)

Collate = Callable[[list[Any]], Any]


class SeededSamples(list[Any]):
    """The samples of one batch, with the place in the run that its collator's randomness comes from.

    Attributes:
        place: (data seed of the run, position). Positions differ between the batches of a run, and
            do not depend on ranks or workers. None where nobody knows.
    """

    def __init__(self, samples: Sequence[Any] = (), place: tuple[int, int] | None = None) -> None:
        super().__init__(samples)
        self.place = place


@attrs.define(eq=False)
class SeededDataset(Dataset[Any]):
    """A map-style dataset addressed by ``(epoch, index)``, each sample fetched from its own seed.

    Args:
        dataset: Anything with ``__getitem__`` over 0..n-1.
        seed: The data seed of the run.
        enabled: False fetches without touching any generator.

    Raises:
        TypeError: ``dataset`` is iterable-style, so its samples have no index.
    """

    dataset: Any
    seed: int
    enabled: bool = True
    _epoch: int | None = attrs.field(default=None, init=False, repr=False)
    _prefix: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        iterable = isinstance(self.dataset, IterableDataset)
        if iterable or not hasattr(self.dataset, "__getitem__"):
            raise TypeError(
                "SeededDataset: expected a map-style dataset (with __getitem__), got "
                f"{type(self.dataset).__name__}. Samples of an iterable dataset have no index; "
                "read it through a Stream instead."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_seed(self, epoch: int, index: int) -> int:
        """``mix(seed, epoch, index)``; the part that an epoch's samples share is kept."""
        if epoch != self._epoch:
            self._epoch, self._prefix = epoch, mix(self.seed, epoch)
        return splitmix64(self._prefix ^ (index & MASK64))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if not self.enabled:
            return self.dataset[index]
        with lent_host_rng():
            seed_host(self.sample_seed(epoch, index))
            return self.dataset[index]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> SeededSamples:
        """Fetch a batch; outside workers the generators are given back once, after it."""
        if not keys:
            return SeededSamples()
        position = keys.position if isinstance(keys, BatchKeys) else mix(*keys[0]) >> 1
        place = self.seed, position
        if not self.enabled:
            return SeededSamples(self._fetch_plain(keys), place)
        with lent_host_rng():
            if _fetches_tables(self.dataset):
                seed_host(mix(self.seed, *keys[0]))
                return SeededSamples(self._fetch_plain(keys), place)
            return SeededSamples(self._fetch_seeded(keys), place)

    def _fetch_seeded(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        dataset, epoch = self.dataset, keys[0][0]
        if any(key[0] != epoch for key in keys):
            return [self[key] for key in keys]
        samples = []
        prefix = mix(self.seed, epoch)  # ``sample_seed`` without a call for every sample
        for _, index in keys:
            seed_host(splitmix64(prefix ^ (index & MASK64)))
            samples.append(dataset[index])
        return samples

    def _fetch_plain(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        indices = [index for _, index in keys]
        if getattr(self.dataset, "__getitems__", None):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]


def _fetches_tables(dataset: Any) -> bool:
    """Whether reading a batch at once gives what reading its samples one by one gives.

    True of a ``datasets.Dataset`` without a transform, which only reads and decodes, and is much
    faster by the batch. Anything else with ``__getitems__`` (a ``Subset``, say) may draw numbers.
    """
    return (
        hasattr(dataset, "__getitems__")
        and hasattr(dataset, "column_names")
        and not has_transform(dataset)
    )


@attrs.frozen(eq=False)
class SeededCollator:
    """A collator whose randomness depends only on the place of the batch in the run.

    The three global generators are seeded from it, and a `PositionedCollator`, also one that is
    wrapped in another with the attribute ``collate``, is told it. A batch without samples (a rank's
    share of an epoch's last global batch can be empty) gives None.

    Args:
        collate: Makes a batch from a list of samples.
        enabled: False collates without touching any generator.
    """

    collate: Collate
    enabled: bool = True

    def __call__(self, samples: Sequence[Any]) -> Any:
        if not samples:
            return None
        place = getattr(samples, "place", None)
        if place is None or not self.enabled:
            return self.collate(list(samples))
        _set_position(self.collate, *place)
        seed, position = place
        with lent_host_rng():
            seed_host(mix(seed, COLLATE, position))
            return self.collate(list(samples))


def _set_position(collate: Any, seed: int, position: int) -> None:
    while collate is not None:
        if isinstance(collate, PositionedCollator):
            collate.set_position(seed, position)
        collate = getattr(collate, "collate", None)
