"""The batches of each rank, cut from a global order.

The epoch is cut into batches of ``batch_size`` consecutive positions, and batch k goes to rank
``k % num_replicas``, as accelerate deals batches out; ``num_replicas`` batches side by side are one
global batch. Batches are therefore the same on any number of ranks; only who computes them differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainer.data.order import Order

# Positions translated at a time: orders are vectorised, a single batch would be mostly overhead.
_BLOCK = 4096


class BatchKeys(list[tuple[int, int]]):
    """The samples of one batch as ``(epoch, index)``, and where in the run the batch begins.

    Attributes:
        position: The global position of the first sample, counted over epochs; the same on any
            number of ranks.
    """

    def __init__(self, keys: Iterable[tuple[int, int]] = (), position: int = 0) -> None:
        super().__init__(keys)
        self.position = position


class GlobalBatchSampler:
    """A batch sampler that yields `BatchKeys`, for `SeededDataset` to fetch.

    Iterating yields the batches from the position that was set to the end of the epoch, and moves
    nothing: a loader runs ahead of training, so only its owner knows how far training got. The
    position is held in samples over all ranks (``start_sample``), so that a run can go on with
    another number of ranks.

    Args:
        order: Which sample stands where.
        batch_size: Samples of a rank in one (micro-)batch.
        num_replicas: Ranks that share the data.
        rank: This rank, in [0, num_replicas).
        drop_last: Leave out the last global batch where it is not full.
        epoch: Epoch to iterate over.
        start_batch: Batches (of each rank) of that epoch to pass over.
        even_batches: How a last global batch that is not full is shared. False: every sample
            exactly once; later ranks get a short batch or an empty list, so that all ranks count
            the same number of batches. True: completed with the epoch's first samples, as
            accelerate does by default; `repeated` counts them.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        epoch: int = 0,
        start_batch: int = 0,
        even_batches: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_replicas", num_replicas)):
            if value < 1:
                raise ValueError(f"GlobalBatchSampler: {name} must be at least 1, got {value}.")
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"GlobalBatchSampler: rank must lie in [0, num_replicas={num_replicas}), "
                f"got {rank}."
            )
        self.order = order
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        self.even_batches = even_batches
        self.epoch = 0
        self.start_sample = 0
        self.set_position(epoch, start_batch)

    @property
    def global_batch_size(self) -> int:
        """Samples of all ranks in one (micro-)batch."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever the position; the same on every rank."""
        return self._batches(len(self.order))

    @property
    def remaining(self) -> int:
        """Batches that iterating yields from the position that is set."""
        return self._batches(len(self.order) - self.start_sample)

    def _batches(self, samples: int) -> int:
        if self.drop_last:
            return samples // self.global_batch_size
        return -(-samples // self.global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``."""
        self.seek(epoch, 0)

    def set_position(self, epoch: int, batch: int) -> None:
        """Go to batch ``batch`` (counted on each rank) of ``epoch``; reads no sample."""
        if not 0 <= batch <= len(self):
            raise ValueError(
                f"GlobalBatchSampler: an epoch has {len(self)} batches, so the batch to start from "
                f"lies in [0, {len(self)}], got {batch}."
            )
        self.seek(epoch, min(batch * self.global_batch_size, len(self.order)))

    def seek(self, epoch: int, sample: int) -> None:
        """Go to position ``sample`` of ``epoch``, counted over all ranks.

        Batches are cut from there on. Seeking to ``batch * global_batch_size`` of another number of
        ranks goes on exactly where that run stopped.
        """
        if epoch < 0 or not 0 <= sample <= len(self.order):
            raise ValueError(
                f"GlobalBatchSampler: expected an epoch of at least 0 and a sample in "
                f"[0, {len(self.order)}], got epoch {epoch} and sample {sample}."
            )
        self.epoch, self.start_sample = epoch, sample

    def state_dict(self) -> dict[str, int]:
        """The position, as plain ints that mean the same on any number of ranks."""
        return {"epoch": self.epoch, "start_sample": self.start_sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position that `state_dict` gave."""
        self.seek(state["epoch"], state["start_sample"])

    def repeated(self, number: int) -> int:
        """How many of the last samples in batch ``number`` of an epoch are repeated ones.

        ``number`` counts this rank's batches from the start of the epoch. Above 0 only in the last
        batch with ``even_batches``; predictions and losses of these samples are not to be counted.
        """
        if not self.even_batches:
            return 0
        stop = number * self.global_batch_size + (self.rank + 1) * self.batch_size
        return min(self.batch_size, max(0, stop - len(self.order)))

    def __iter__(self) -> Iterator[BatchKeys]:
        epoch, start, count = self.epoch, self.start_sample, self.remaining
        where = epoch * len(self.order) + start + self.rank * self.batch_size
        block = max(1, _BLOCK // self.batch_size)
        for first in range(0, count, block):
            positions, sizes = self._positions(start, first, min(first + block, count))
            indices = self.order.take(epoch, positions).tolist()
            taken = 0
            for number, size in enumerate(sizes, first):
                keys = [(epoch, index) for index in indices[taken : taken + size]]
                yield BatchKeys(keys, where + number * self.global_batch_size)
                taken += size

    def _positions(self, start: int, first: int, stop: int) -> tuple[Tensor, list[int]]:
        """Positions of this rank's batches first..stop-1 after ``start``, and each batch's size."""
        n = len(self.order)
        batches = torch.arange(first, stop, device="cpu") * self.global_batch_size
        offsets = start + self.rank * self.batch_size + torch.arange(self.batch_size, device="cpu")
        grid = batches[:, None] + offsets  # (batches, batch_size)
        if self.even_batches:
            grid = torch.where(grid < n, grid, (grid - n) % n)  # n = 0 gives no batch at all
            return grid.flatten(), [self.batch_size] * len(grid)
        inside = grid < n
        return grid[inside], inside.sum(dim=1).tolist()
