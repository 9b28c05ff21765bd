"""Randomness of collators as a function of (seed, position) instead of a stream's state.

A collator that draws from a running stream gives other batches after a resume, with other worker
counts, or when anything else draws in between. A positioned collator is told before each batch
where in the run the batch lies, and draws from a generator of its own made from just that.

The seed of that generator is ``mix(seed, position)`` of :mod:`trainer.data.seeding`: the state
starts at 0 and becomes ``splitmix64(state XOR word)`` for each word in turn. SplitMix64 (G. L.
Steele, D. Lea, C. H. Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) adds
0x9E3779B97F4A7C15 and finalises with two multiplications and three shifts, all modulo 2**64. For
one seed, different positions give different 64-bit values. PyTorch's CPU generator (mt19937) reads
the low 32 bits of a seed, so two given positions share their stream with probability 2**-32.
"""

from __future__ import annotations

from operator import index
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import get_worker_info

from trainer.data.seeding import mix

_MAIN_PROCESS = -1


@runtime_checkable
class PositionedCollator(Protocol):
    """A collator whose randomness is a function of the place that it was last given."""

    def set_position(self, seed: int, position: int) -> None:
        """Places the next batch: its randomness is f(seed, position)."""

    def __call__(self, features: list[Any], /) -> Any:
        """Collates rows into a batch."""


class RandomCollatorMixin:
    """Gives a collator its own ``generator`` and ``set_position``.

    Where the numbers come from, first match:

    1. after ``set_position``: a generator made from (seed, position), and the collator's own
       ``seed`` where it has one;
    2. ``generator``, if it was assigned from outside;
    3. with ``seed``: a generator made from it at the first draw, from seed + worker id in a worker
       process of a DataLoader;
    4. otherwise PyTorch's default generator.

    In cases 1 to 3 no global generator is read or moved.
    """

    generator: torch.Generator | None = None
    seed: int | None = None
    _seeded_for: int | None = None  # the worker whose stream ``generator`` is (case 3)

    def set_position(self, seed: int, position: int) -> None:
        """Makes the next draws a function of (seed, position).

        ``position`` numbers the batches of a run; whoever splits a batch over ranks or
        micro-batches gives each part its own number. Raises TypeError unless both are integers.
        """
        place = (_integer("seed", seed), _integer("position", position))
        own = () if self.seed is None else (self.seed,)
        # A new object, so that a copy of this collator, or an owner of the old one, is not moved.
        self.generator = torch.Generator().manual_seed(mix(*place, *own))
        self._seeded_for = None

    def _generator(self) -> torch.Generator | None:
        """The generator to draw from now; None stands for PyTorch's default one."""
        if self.seed is None:
            return self.generator
        info = get_worker_info()
        worker = _MAIN_PROCESS if info is None else info.id
        # A forked worker inherits a generator already in use; the workers must not all repeat it.
        inherited = self._seeded_for is not None and self._seeded_for != worker
        if self.generator is None or inherited:
            self.generator = torch.Generator().manual_seed(self.seed + max(worker, 0))
            self._seeded_for = worker
        return self.generator


def _integer(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(
            f"set_position: {name} must be an integer, got {type(value).__name__}."
        ) from None
