"""The global generators of Python, NumPy and PyTorch: seeding them, and giving them back.

What draws from them is repeatable only if they are seeded from something that does not depend on
what ran before; `mix` makes such seeds. A worker process belongs to the loader and keeps the state
that is left behind; in the main process the three states are put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import get_worker_info

from trainstep.rng import mix as splitmix64

MASK64 = (1 << 64) - 1

# Separate the seeds of collators, workers and streams from those of samples, whose index and epoch
# stay below.
COLLATE, WORKER, STREAM = (1 << 63) + 1, (1 << 63) + 2, (1 << 63) + 4

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


# Looked up once: seeding is done for every sample.
_python: Any = random._inst
# What ``random.seed`` calls for an integer, without its checks.
_seed_python = super(random.Random, _python).seed
_seed_numpy = np.random.seed  # of the global generator, which is what user code draws from
# torch.manual_seed would also walk over every accelerator and costs many times as much.
_seed_torch = torch.default_generator.manual_seed


def seed_host(value: int) -> None:
    """Seed Python's ``random``, NumPy's global generator and PyTorch's CPU generator.

    ``value`` is a 64-bit hash. PyTorch's and NumPy's Mersenne twisters are initialised alike from
    32 bits, so they get different halves; with the same ones their streams would be identical.
    """
    _seed_torch(value)
    _seed_python(value)
    _python.gauss_next = None  # the second of a pair of normal deviates
    _seed_numpy(value >> 32)


@contextmanager
def preserved_host_rng() -> Iterator[None]:
    """Put the states of the three host generators back on leaving, also after an exception.

    Inside, they go on from where they stand. An inner block does nothing and leaves restoring to
    the outermost.
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
def lent_host_rng() -> Iterator[None]:
    """Like ``preserved_host_rng``, for code that calls ``seed_host`` before anything is drawn.

    NumPy's generator is exchanged for another while it is lent, whose state is not defined: copying
    a state of NumPy takes many times as long as all the rest. Does nothing in a worker process,
    which nobody else draws from.
    """
    if _preserving.get() or get_worker_info() is not None:
        yield
        return
    token = _preserving.set(True)
    python_state = random.getstate()
    torch_state = torch.default_generator.get_state()
    give_back = _lend_numpy()
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)
        give_back()
        _preserving.reset(token)


class _NoBits:
    """Stands in for a bit generator, so that the rest of a RandomState's state can be had alone."""

    @property
    def state(self) -> dict[str, Any]:
        return {"bit_generator": "MT19937", "state": None}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        pass


_no_bits = _NoBits()
_spare = np.random.MT19937(0)


def _lend_numpy() -> Callable[[], None]:
    """Exchange the bit generator of NumPy's global functions; returns what puts it back.

    An exchange forgets the normal deviate that may have been kept from a pair, so that is read
    before and written afterwards.
    """
    shared: Any = np.random.mtrand._rand
    own = np.random.mtrand.get_bit_generator()
    shared._bit_generator = _no_bits
    try:
        deviate = shared.get_state(legacy=False)
    finally:
        shared._bit_generator = own
    np.random.mtrand.set_bit_generator(_spare)

    def give_back() -> None:
        np.random.mtrand.set_bit_generator(own)
        shared._bit_generator = _no_bits
        try:
            shared.set_state(deviate)
        finally:
            shared._bit_generator = own

    return give_back


def has_transform(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset``-like object runs a user's function at every access.

    That is what ``set_transform`` and ``with_transform`` record as the format type "custom".
    """
    format_ = getattr(dataset, "format", None)
    return isinstance(format_, Mapping) and format_.get("type") == "custom"


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
        seed_host(mix(self.seed, WORKER, self.epoch, self.rank, worker_id))
