"""The loader of a `Stream`: batches out of marked batches, and the place that they lead to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import attrs
from torch.utils.data import DataLoader

from trainer.data.iterable import Stream
from trainer.data.places import Mark, Place
from trainer.data.reading import Batch

logger = logging.getLogger(__name__)


class StreamLoader(DataLoader[Any]):
    """Loads batches of an iterable dataset.

    Args:
        stream: What to read. It is the loader's ``dataset``.
        collate: Makes a batch from `SeededSamples`.
        options: Of the DataLoader: workers, pinning, and so on.

    Attributes:
        place: Where the batch that was given last leads to.
    """

    dataset: Stream
    place: Place

    def __init__(self, stream: Stream, collate: Callable[[Any], Any], **options: Any) -> None:
        marked: Callable[[Any], Any] = _CollateMarked(collate)
        super().__init__(stream, batch_size=None, collate_fn=marked, **options)
        self.place = self._at_the_beginning()
        self._told: set[str] = set()

    def __len__(self) -> int:
        """Batches of a pass, the same on every rank; TypeError if the dataset tells no length."""
        samples, size = len(self.dataset), self.dataset.global_batch_size
        return samples // size if self.dataset.drop_last else -(-samples // size)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.dataset.start
        self.place = self._at_the_beginning()
        if start is not None and start.epoch == self.place.epoch:
            self.place = attrs.evolve(start, shards=list(start.shards))
        marked = super().__iter__()
        if self.num_workers > 0:
            self.dataset.start = None  # the workers have it
        for batch, mark in marked:
            self._warn(mark)
            self.place.note(mark)
            if mark.batch:
                yield batch

    @property
    def readers(self) -> int:
        """Processes that read."""
        return max(1, self.num_workers)

    @property
    def keeps_readers(self) -> bool:
        """Whether the dataset of one pass, as it was left, is that of the next."""
        return self.num_workers == 0 or self.persistent_workers

    def go_to(self, place: Place | None) -> None:
        """Let the next pass begin at a place, if it is of the epoch that is set by then.

        Raises:
            ValueError: if the place cannot be reached with this number of workers.
        """
        if place is None or (place.begins_epoch and not self.keeps_readers):
            self.dataset.start = None  # new workers begin with the dataset as it is here
        else:
            self.dataset.start = place.for_readers(self.readers)

    def place_in(self, epoch: int) -> Place | None:
        """Return where training stands if that is in ``epoch``: this one, or one that is to begin."""
        if epoch == self.place.epoch:
            return self.place
        last = [shard for shard in self.place.shards if shard is not None]
        over = len(last) == len(self.place.shards) and all(shard.ended for shard in last)
        if epoch == self.place.epoch + 1 and over and self.keeps_readers:
            return self.place.next_epoch()
        return None

    def _at_the_beginning(self) -> Place:
        return Place(self.dataset.epoch or 0, self.readers)

    def _warn(self, mark: Mark) -> None:
        name = type(self.dataset.dataset).__name__
        if self.readers > 1 and mark.own is False:
            self._tell(
                f"{name} gives all {self.readers} workers the same samples. Each reads all of them and "
                f"keeps one batch in {self.readers}, so that no sample comes twice, but it gets no faster. "
                "Let its __iter__ choose samples by torch.utils.data.get_worker_info(), or set "
                "dataloader_num_workers=1."
            )
        if mark.problem:
            self._tell(
                f"The state of {name} is not kept in checkpoints, so that resuming reads all samples of "
                f"the epoch again: {mark.problem}"
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)


@attrs.frozen(eq=False)
class _CollateMarked:
    """Collates the samples of a marked batch; picklable, for workers."""

    collate: Callable[[Any], Any]

    def __call__(self, marked: Batch) -> tuple[Any, Mark]:
        samples, mark = marked
        return (None if samples is None else self.collate(samples)), mark
