"""The order in which samples of similar length stand together."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from trainer.data.order import _at_least, _generator, _Latest, _Materialised


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
