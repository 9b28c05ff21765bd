"""One pass over an iterable dataset by one process; see ``trainer.data.iterable``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import attrs

from trainer.data.places import Mark, Place, Shard
from trainer.data.seeded import SeededSamples
from trainer.data.seeding import STREAM, lent_host_rng, mix, seed_host
from trainer.data.states import decode, encode, stateful
from trainer.data.watching import WatchedWorker, watch

if TYPE_CHECKING:
    from trainer.data.iterable import Stream

Batch = tuple[SeededSamples | None, Mark]


def progress(total: int, shown: bool, unit: str = "samples") -> Any:
    """Return a progress bar for reading again what was read before."""
    from tqdm import tqdm

    return tqdm(total=total, desc="Reading again", unit=f" {unit}", disable=not shown)


@attrs.define(eq=False)
class Reader:
    """One pass over a stream by one process.

    Attributes:
        stream: What to read, and how it is cut.
        worker: Number of this reader.
        workers: How many readers there are.
        epoch: The epoch of the pass.
        drawn: Samples drawn in this pass, those before a resume included.
        ended: Whether the dataset has no more.
        own: Whether the dataset divides its samples among workers; None while that is not known, and
            with one reader.
        first_state: The state of the dataset before its first pass in this process.
        complete: Whether the pass came to its end.
    """

    stream: Stream
    worker: int
    workers: int
    epoch: int = attrs.field(init=False)
    drawn: int = attrs.field(default=0, init=False)
    ended: bool = attrs.field(default=False, init=False)
    own: bool | None = attrs.field(default=None, init=False)
    first_state: Any = attrs.field(default=None, init=False)
    complete: bool = attrs.field(default=False, init=False)
    _place: Place | None = attrs.field(default=None, init=False)
    _iterator: Any = attrs.field(default=None, init=False)
    _watched: WatchedWorker | None = attrs.field(default=None, init=False)
    _problem: str | None = attrs.field(default=None, init=False)

    def begin(self, start: Place | None, before: Reader | None) -> None:
        """Put the dataset where the pass begins.

        Args:
            start: A place to go to, if it is in the epoch of the stream.
            before: The reader of the pass before. If that was cut short, the dataset goes back to its
                first state, so that what was left over does not turn up in this epoch.
        """
        self.epoch = self.stream.epoch or 0
        if start is not None and start.epoch == self.epoch:
            self._place = start
        self._rewind(before)
        self._settle()
        shard = (self._place and self._place.shard(self.worker)) or Shard()
        state = {} if shard.state is None else decode(shard.state)
        self._restore(state, middle=shard.drawn > 0)
        if state:
            self.drawn = shard.drawn
        else:
            self._read_again(shard.drawn)
        self.ended = self.ended or shard.ended

    def read(self) -> Iterator[Batch]:
        """Yield this reader's batches, and at the end a mark without one."""
        stream, place = self.stream, self._place
        if place is not None and self.own and self.worker < place.turn:
            yield None, self._mark()  # lets the reader go first whose turn it is
        for number in count():
            before = self.drawn
            samples = self._draw()
            short = self.drawn - before < stream.global_batch_size
            if self.drawn == before or (short and stream.drop_last):
                break
            if self.own or number % self.workers == self.worker:
                position = mix(self.epoch, self._source, before) >> 1
                yield SeededSamples(samples, (stream.seed, position)), self._mark(batch=True)
        self.complete = True
        yield None, self._mark()

    # ---- where to begin

    def _rewind(self, before: Reader | None) -> None:
        dataset = self.stream.dataset
        if not stateful(dataset):
            return
        if before is None:
            self.first_state = copy.deepcopy(dataset.state_dict())
            return
        self.first_state = before.first_state
        if not before.complete:
            dataset.load_state_dict(copy.deepcopy(self.first_state))

    def _restore(self, state: dict[str, Any], middle: bool) -> None:
        """Load a state and begin to iterate. ``middle``: it is one of this epoch, not of the last."""
        dataset = self.stream.dataset
        if "dataset" in state and not middle:
            dataset.load_state_dict(state["dataset"])
        self.stream.tell_epoch()
        if "dataset" in state and middle:
            dataset.load_state_dict(state["dataset"])
        with self._lent():
            self._seed()
            self._watch(True)
            self._iterator = iter(dataset)
            self._watch(False)
        if "iterator" in state and middle:
            self._iterator.load_state_dict(state["iterator"])

    def _read_again(self, samples: int) -> None:
        """Draw and drop ``samples`` samples."""
        if not samples:
            return
        with progress(samples, self.stream.progress and not self.worker) as bar, self._lent():
            while self.drawn < samples and not self.ended:
                self._next()
                bar.update()

    def _settle(self) -> None:
        """Find out whether the dataset divides its samples, or watch it until it is known."""
        if self.workers == 1:
            return
        declared = getattr(self.stream.dataset, "shards_workers", None)
        self.own = declared if self._place is None else self._place.own
        if self.own is None:
            self._decide(declared)
        if declared is None and not self.own:
            self._watched = watch(self.stream.dataset)

    def _decide(self, own: bool | None) -> None:
        self.own = own
        if own and self._place is not None and self._place.shards[0] not in (None, Shard()):
            raise ValueError(
                "the checkpoint was written with a single reader of the iterable dataset, which divides "
                f"its samples among {self.workers} workers now. Set dataloader_num_workers=0 or 1, or "
                "ignore_data_skip=True to begin the epoch again."
            )

    # ---- drawing

    @property
    def _source(self) -> int:
        """Tells apart readers that draw other samples than this one."""
        return self.stream.own_of_rank << 32 | (self.worker if self.own else 0)

    def _lent(self) -> AbstractContextManager[None]:
        return lent_host_rng() if self.stream.seeded else nullcontext()

    def _seed(self) -> None:
        # The first sample has the same seed everywhere: what a dataset shuffles before it divides its
        # samples must be shuffled alike.
        if self.stream.seeded:
            source = self._source if self.drawn else 0
            seed_host(mix(self.stream.seed, STREAM, self.epoch, source, self.drawn))

    def _draw(self) -> list[Any]:
        """Draw a global batch and return this rank's share."""
        samples: list[Any] = []
        first = self.stream.rank * self.stream.batch_size
        mine = range(first, first + self.stream.batch_size)
        with self._lent():
            for offset in range(self.stream.global_batch_size):
                sample = self._next()
                if self.ended:
                    break
                if offset in mine:
                    samples.append(sample)
        return samples

    def _next(self) -> Any:
        """Draw a sample; at the end, returns None and sets ``ended``."""
        if self.ended:
            return None
        self._seed()
        sample = None
        self._watch(True)
        try:
            sample = next(self._iterator)
            self.drawn += 1
        except StopIteration:
            self.ended = True
        self._watch(False)
        if self._watched is not None:
            self._look(self._watched)
        return sample

    def _watch(self, on: bool) -> None:
        if self._watched is not None:
            self._watched.watching = on

    def _look(self, watched: WatchedWorker) -> None:
        if self.own is None:
            self._decide(watched.asked)
            if self.own:
                self._watched = None
        elif watched.asked:
            raise RuntimeError(
                f"{type(self.stream.dataset).__name__} asked get_worker_info() which worker it is in after "
                f"{self.drawn} samples, when it was taken for a dataset that gives every worker the same. "
                "Let it ask before its first sample, or give it an attribute: shards_workers = True if it "
                "gives each worker other samples, False if not."
            )

    # ---- where the dataset stands

    def _mark(self, batch: bool = False) -> Mark:
        state = self._state()
        return Mark(self.worker, self.own, batch, self.drawn, self.ended, state, self._problem)

    def _state(self) -> str | None:
        """Return the state of dataset and iterator as a JSON text; None if they have none."""
        dataset, iterator = self.stream.dataset, self._iterator
        parts = {}
        if self.stream.exact:
            parts["dataset"] = dataset
        if stateful(iterator) and (self.stream.exact or iterator is not dataset):
            parts["iterator"] = iterator
        if not parts or self._problem:
            return None
        try:
            states = {name: encode(part.state_dict(), name) for name, part in parts.items()}
        except TypeError as error:
            self._problem = str(error)
            return None
        return json.dumps(states)
