"""Where a pass over an iterable dataset stands: told by its readers, kept in checkpoints."""

from __future__ import annotations

import json
from typing import Any

import attrs


@attrs.frozen
class Shard:
    """Where one reader of a stream stands.

    Attributes:
        drawn: Samples that it has drawn in this epoch.
        ended: Whether it came to the end.
        state: The state of dataset and iterator there, as JSON holds it; None if there is none.
    """

    drawn: int = 0
    ended: bool = False
    state: Any = None


@attrs.frozen
class Mark:
    """What a reader tells along with each batch. Plain values: it travels between processes.

    Attributes:
        worker: Which worker reads; 0 in the main process.
        own: Whether the dataset divides its samples among workers itself; None with one reader.
        batch: Whether a batch comes with it; the last mark of a pass comes alone.
        drawn: See `Shard`.
        ended: See `Shard`.
        state: The state as a JSON text, taken right after the batch was drawn.
        problem: Why the state cannot be kept.
    """

    worker: int
    own: bool | None
    batch: bool
    drawn: int
    ended: bool
    state: str | None = None
    problem: str | None = None


@attrs.define
class Place:
    """Where a pass stands: which batches were handed out, however far workers have read ahead.

    Attributes:
        epoch: The epoch of the pass.
        workers: Readers: processes that load, or 1 for the main process.
        own: See `Mark`. Unless it is True, every reader reads the whole stream, and one `Shard` tells
            where all of them stand.
        turn: The reader whose batch comes next, where the readers' streams differ.
        shards: Where each reader stands; None for one that has not begun.
    """

    epoch: int
    workers: int = 1
    own: bool | None = None
    turn: int = 0
    shards: list[Shard | None] = attrs.field(factory=lambda: [None])

    def note(self, mark: Mark) -> None:
        """Take in the mark of a batch that is handed out, or of the end of a reader's stream."""
        state = None if mark.state is None else json.loads(mark.state)
        shard = Shard(mark.drawn, mark.ended, state)
        if not mark.own:
            self.own, self.turn, self.shards = mark.own, 0, [shard]
            return
        if not self.own:
            self.own, self.shards = True, [None] * self.workers
        self.shards[mark.worker] = shard
        if mark.batch:
            self.turn = (mark.worker + 1) % self.workers

    def next_epoch(self) -> Place:
        """Return the place at the beginning of the epoch after one that was read to its end."""
        shards = [shard and Shard(state=shard.state) for shard in self.shards]
        return Place(self.epoch + 1, self.workers, self.own, 0, shards)

    def shard(self, worker: int) -> Shard | None:
        """Return where the reader of number ``worker`` is to begin; None for the beginning."""
        return self.shards[worker if self.own else 0]

    @property
    def begins_epoch(self) -> bool:
        """Whether nothing of the epoch was used."""
        return all(shard is None or shard.drawn == 0 for shard in self.shards)

    @property
    def reads_again(self) -> bool:
        """Whether to come here, samples have to be read that were read before."""
        return any(s is not None and s.drawn > 0 and s.state is None for s in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the place as JSON holds it."""
        return attrs.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Place:
        """Read what ``to_json`` gave."""
        shards = [shard and Shard(**shard) for shard in value["shards"]]
        return cls(**{**value, "shards": shards})

    def for_readers(self, workers: int) -> Place:
        """Return this place for as many readers as there are now.

        Raises:
            ValueError: if each reader had a stream of its own, and there were more or fewer of them.
        """
        if self.own and self.workers != workers:
            raise ValueError(
                f"the checkpoint was written with dataloader_num_workers={self.workers}, among which the "
                f"iterable dataset divides its samples, so it cannot be continued with {workers}. Set "
                f"dataloader_num_workers={self.workers}, or ignore_data_skip=True to begin the epoch again."
            )
        return attrs.evolve(self, workers=workers)
