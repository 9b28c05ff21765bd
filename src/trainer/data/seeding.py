"""Per-sample seeding: the randomness of data is a function of (seed, epoch, sample).

Augmentations and collators draw from the global generators of Python, NumPy and PyTorch. Left
alone, what they draw depends on how many workers there are, how far these prefetch, and where a run
was resumed. Here the three generators are set from ``mix(seed, epoch, index)`` before a sample is
fetched, and from the first sample of a batch before the batch is collated, so the same sample in
the same epoch is always the same bits. A worker process belongs to the loader and keeps the state
that is left behind; in the main process the three states are put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from trainstep.rng import mix as splitmix64

MASK64 = (1 << 64) - 1

# Separates the seeds of collators and workers from those of samples: index and epoch stay below it.
_COLLATE, _WORKER = (1 << 63) + 1, (1 << 63) + 2

_preserving: ContextVar[bool] = ContextVar("trainer_host_rng_preserved", default=False)


def mix(*ints: int) -> int:
    """Fold ``ints`` (each taken modulo 2**64) into one 64-bit hash.

    ``h = 0``, then ``h = splitmix64(h XOR value)`` for each value: order matters, and for a fixed
    prefix different last values always give different results.
    """
    h = 0
    for value in ints:
        h = splitmix64(h ^ (value & MASK64))
    return h


def seed_host(value: int) -> None:
    """Seed Python's ``random``, NumPy's global generator and PyTorch's CPU generator.

    ``value`` is a 64-bit hash. PyTorch's and NumPy's Mersenne twisters are initialised alike from
    32 bits, so they get different halves; with the same ones their streams would be identical.
    """
    # torch.manual_seed would also walk over every accelerator and costs many times as much.
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value >> 32)  # noqa: NPY002 (the global generator is what user code draws from)


@contextmanager
def preserved_host_rng() -> Iterator[None]:
    """Put the states of the three host generators back on leaving, also after an exception.

    Saving and restoring costs far more than seeding (NumPy's state most of all), so an inner block
    does nothing and leaves it to the outermost: a loader wraps the fetch and the collation of a
    batch in one.
    """
    if _preserving.get():
        yield
        return
    token = _preserving.set(True)
    python_state = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.default_generator.set_state(torch_state)
        _preserving.reset(token)


@contextmanager
def _restored_outside_workers() -> Iterator[None]:
    """``preserved_host_rng`` in the main process, nothing in a worker."""
    if get_worker_info() is not None:
        yield
        return
    with preserved_host_rng():
        yield


def has_transform(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset``-like object runs a user's function at every access.

    That is what ``set_transform`` and ``with_transform`` record as the format type "custom".
    """
    format_ = getattr(dataset, "format", None)
    return isinstance(format_, Mapping) and format_.get("type") == "custom"


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


class SeededSamples(list[Any]):
    """The samples of one batch, with the 64-bit ``seed`` that its collator draws from."""

    def __init__(self, samples: Sequence[Any] = (), seed: int | None = None) -> None:
        super().__init__(samples)
        self.seed = seed


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
                "seed its workers with WorkerInit instead."
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
        with _restored_outside_workers():
            seed_host(self.sample_seed(epoch, index))
            return self.dataset[index]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> SeededSamples:
        """Fetch a batch; outside workers the generators are saved and restored once around it."""
        if not self.enabled or not keys:
            return SeededSamples(self._fetch_plain(keys))
        batch_seed = mix(self.seed, _COLLATE, *keys[0])
        with _restored_outside_workers():
            if _fetches_tables(self.dataset):
                seed_host(batch_seed)
                return SeededSamples(self._fetch_plain(keys), batch_seed)
            samples = []
            for epoch, index in keys:
                seed_host(self.sample_seed(epoch, index))
                samples.append(self.dataset[index])
            return SeededSamples(samples, batch_seed)

    def _fetch_plain(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        indices = [index for _, index in keys]
        if indices and getattr(self.dataset, "__getitems__", None):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]


@attrs.frozen(eq=False)
class SeededCollator:
    """A collator whose draws from the global generators depend only on the batch.

    They are seeded from (seed, epoch, first sample) of the batch, which `SeededDataset` hands
    over. A batch without samples (a rank's share of an epoch's last global batch can be empty)
    gives None.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        if not samples:
            return None
        seed = getattr(samples, "seed", None)
        if seed is None:
            return self.collate(list(samples))
        with _restored_outside_workers():
            seed_host(seed)
            return self.collate(list(samples))


@attrs.frozen
class WorkerInit:
    """``worker_init_fn``: every worker of every rank starts each epoch from a seed of its own.

    It serves what draws outside a sample: iterable datasets, and set-up code in a worker. Unlike
    PyTorch's default, nothing is drawn from the main process's generator to make the seed.
    """

    seed: int
    rank: int = 0
    epoch: int = 0

    def __call__(self, worker_id: int) -> None:
        seed_host(mix(self.seed, _WORKER, self.epoch, self.rank, worker_id))
