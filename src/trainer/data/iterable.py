"""Iterable datasets cut into batches, so that a pass can stop anywhere and go on exactly there.

Readers, which are worker processes or the main process, draw samples from the dataset and send each
batch with a `Mark` that tells where the dataset stood right after that batch. How far they have read
ahead does not matter then: the place of training is the mark of the last batch that was used.

**Ranks.** The stream is cut into global batches of ``batch_size * world_size`` samples, and every
rank keeps its share of each. A dataset that gives each rank other samples itself says so by an
attribute ``shards_ranks = True``; ``datasets.distributed.split_dataset_by_node`` is recognised.

**Workers.** A dataset that asks ``torch.utils.data.get_worker_info()`` for its worker before it gives
its first sample divides the work itself, and is left alone. From any other, all workers read the
same samples and take turns in keeping a batch: the batches are those of a single reader, none comes
twice, and reading gets no faster. An attribute ``shards_workers`` (True or False) decides where the
question would mislead.

**Randomness.** The global generators are seeded from (seed, epoch, number of the sample) before a
sample is drawn, unless the dataset has ``deterministic = True``. What a dataset draws before its
first sample (to shuffle files, say) is a function of (seed, epoch), and belongs in its state.

**Resuming.** A dataset or iterator with ``state_dict`` and ``load_state_dict`` goes on from its state.
From others, the samples that were used are drawn again and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from trainer.data.places import Place
from trainer.data.reading import Batch, Reader
from trainer.data.states import exact
from trainer.data.watching import worker_and_workers


class Stream(IterableDataset[Batch]):
    """An iterable dataset as batches with marks; iterating goes on from ``start`` in its epoch.

    Args:
        dataset: Anything with ``__iter__``.
        batch_size: Samples of a rank in one (micro-)batch.
        seed: The data seed of the run.
        rank: This rank, in [0, world_size).
        world_size: Ranks that share the stream.
        drop_last: Leave out a last global batch that is not full. Otherwise later ranks get a short
            batch or an empty one.
        seeded: Whether to seed the global generators before each sample.
        shared: Let worker processes that live on see ``set_epoch``.
        progress: Show a bar while samples are read again to reach a place.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        seeded: bool = True,
        shared: bool = False,
        progress: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size, self.drop_last = batch_size, drop_last
        self.seed, self.seeded, self.progress = seed, seeded, progress
        split = getattr(dataset, "_distributed", None) is not None  # datasets' own, by node
        self.shards_ranks = bool(getattr(dataset, "shards_ranks", split))
        # A dataset that gives each rank its own samples is cut as if there were one.
        self.rank, self.world_size = (0, 1) if self.shards_ranks else (rank, world_size)
        self.own_of_rank = rank if self.shards_ranks else 0
        self.start: Place | None = None
        self.exact = exact(dataset)
        self._epoch = torch.full((), -1, dtype=torch.int64, device="cpu")
        if shared:
            self._epoch.share_memory_()
        self._reader: Reader | None = None  # of the last pass in this process

    def __len__(self) -> int:
        """Samples of a whole pass; TypeError if the dataset does not tell."""
        return len(self.dataset)

    @property
    def global_batch_size(self) -> int:
        """Samples of all ranks in one (micro-)batch."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int | None:
        """The epoch that was set; None if none was."""
        epoch = int(self._epoch)
        return None if epoch < 0 else epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of ``epoch``."""
        self._epoch.fill_(epoch)
        self.tell_epoch()

    def tell_epoch(self) -> None:
        """Pass the epoch on to the dataset, if one was set and the dataset wants to know."""
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if self.epoch is not None and callable(set_epoch):
            set_epoch(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = worker_and_workers()
        before, start = self._reader, self.start
        self.start = None
        self._reader = reader = Reader(self, worker, workers)
        reader.begin(start, before)
        yield from reader.read()
