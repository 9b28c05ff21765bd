"""The batches of a run, epoch by epoch, with the place that a checkpoint has to keep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from time import perf_counter
from typing import Any

import attrs
from attrs import evolve
from torch.utils.data import DataLoader

from trainer.data.places import Place
from trainer.data.reading import progress
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.seeded import SeededCollator, SeededDataset
from trainer.data.seeding import WorkerInit, lent_host_rng, mix
from trainer.data.states import decode, encode, stateful
from trainer.data.stream_loader import StreamLoader
from trainer.plan import length_of

logger = logging.getLogger(__name__)

Batches = Iterable[Any]


@attrs.define
class DataWait:
    """How long training waited for data.

    Attributes:
        seconds: All the time that fetching batches took, reading to reach a place included.
        batches: How many were fetched.
    """

    seconds: float = 0.0
    batches: int = 0
    _taken: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one batch that took ``seconds``."""
        self.seconds += seconds
        self.batches += 1

    def take(self) -> float:
        """Return the seconds since the last call; called once per update, they are those of its window."""
        new, self._taken = self.seconds - self._taken, self.seconds
        return new


@attrs.define(eq=False)
class Feed:
    """Gives a run the batches of a loader: ``feed(epoch, skip)`` iterates over those of an epoch.

    Args:
        loader: Ours, or any other iterable of batches.
        observe: Wraps the batches of an epoch, to look at them while they are on the host.
        progress: Show a bar while batches are read again to reach a place.

    Attributes:
        wait: How long fetching took.
    """

    loader: Any
    observe: Callable[[Iterator[Any]], Batches] = iter
    progress: bool = False
    wait: DataWait = attrs.field(factory=DataWait, init=False)
    _loaded: dict[str, Any] | None = attrs.field(default=None, init=False)
    _epoch: int | None = attrs.field(default=None, init=False)
    _given: int = attrs.field(default=0, init=False)
    _over: bool = attrs.field(default=False, init=False)
    _rest: Generator[Any] | None = attrs.field(default=None, init=False)

    def __call__(self, epoch: int, skip: int) -> Iterator[Any]:
        """Iterate over the batches of ``epoch``, beginning with number ``skip`` or the place loaded."""
        self._finish()
        state, self._loaded = self._loaded, None
        if state is not None and state["epoch"] != epoch:
            state = None
        self._epoch, self._given, self._over = epoch, skip, False
        length = length_of(self.loader)
        source = batches_from(self.loader, epoch, skip, state=state, show=self.progress)
        observed = iter(self.observe(source))
        while True:
            began = perf_counter()
            batch = next(observed, self)
            if batch is self:
                break
            self.wait.add(perf_counter() - began)
            self._given += 1
            self._rest = source if self._given == length else None
            yield batch
        self._over, self._rest = True, None

    def state(self, epoch: int) -> dict[str, Any] | None:
        """Return what ``load`` needs to go on where training stands, as JSON holds it.

        Args:
            epoch: The epoch in which training stands; the next one if the last was left.

        None if the epoch and the number of the batch tell all, or the epoch is to begin afresh.
        """
        if self._loaded is not None:  # nothing was trained on since
            return self._loaded if self._loaded["epoch"] == epoch else None
        if epoch != self._epoch:
            self._finish()
        if isinstance(self.loader, StreamLoader):
            place = self.loader.place_in(epoch)
            return None if place is None else {"epoch": epoch, "place": place.to_json()}
        if not stateful(self.loader) or (epoch != self._epoch and not self._over):
            return None
        return {"epoch": epoch, "loader": encode(self.loader.state_dict(), "the loader's state")}

    def load(self, state: dict[str, Any] | None) -> None:
        """Let the next pass over its epoch begin at the place that ``state`` returned."""
        self._loaded = state

    def _finish(self) -> None:
        """Let an epoch that was stopped after its last batch come to its end."""
        rest, self._rest = self._rest, None
        if rest is not None:
            for _ in rest:
                pass
            self._over = True


def batches_from(
    loader: Any,
    epoch: int,
    skip: int,
    *,
    state: dict[str, Any] | None = None,
    show: bool = False,
) -> Generator[Any]:
    """Iterate over the batches of ``epoch``, beginning with number ``skip``.

    Our own loaders seek without reading anything. Others are asked to ``set_epoch``, and go on from
    their state if there is one; otherwise the batches to skip are produced and dropped, with a
    warning and, with ``show``, a progress bar.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, GlobalBatchSampler):
        sampler.set_position(epoch, skip)
        _seed_workers(loader, epoch)
        yield from _lending(loader)
        return
    inner = (getattr(loader, "sampler", None), getattr(loader, "dataset", None))
    for owner in (loader, sampler, *inner):
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
            break
    _seed_workers(loader, epoch)
    if state is not None:
        skip = _restore(loader, state, skip)
    iterator = iter(loader)
    if skip:
        _warn_of_reading(skip)
        with progress(skip, show, "batches") as bar:
            for _ in islice(iterator, skip):
                bar.update()
    yield from iterator


def _restore(loader: Any, state: dict[str, Any], skip: int) -> int:
    """Let a loader go on from a state; returns how many batches must be dropped all the same."""
    if "place" in state and isinstance(loader, StreamLoader):
        place = Place.from_json(state["place"])
        loader.go_to(place)
        if place.reads_again:
            _warn_of_reading(skip)
        return 0
    if "loader" in state and stateful(loader):
        loader.load_state_dict(decode(state["loader"]))
        return 0
    return skip


def _warn_of_reading(batches: int) -> None:
    logger.warning(
        "The training data cannot seek: %d batches are read again and dropped to reach the position of "
        "the checkpoint. To spare that, give the dataset state_dict() and load_state_dict(), or begin "
        "the epoch again with ignore_data_skip=True.",
        batches,
    )


def _lending(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a loader of ours; fetching and collating a batch lend the generators only once."""
    dataset, collate = loader.dataset, loader.collate_fn
    seeded = isinstance(dataset, SeededDataset) and dataset.enabled
    seeded |= isinstance(collate, SeededCollator) and collate.enabled
    lent = lent_host_rng if seeded and loader.num_workers == 0 else nullcontext
    iterator = iter(loader)
    while True:
        with lent():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def _seed_workers(loader: Any, epoch: int) -> None:
    """Make what workers of our loaders draw, outside a sample's seeding, a function of the epoch."""
    start = getattr(loader, "worker_init_fn", None)
    if isinstance(start, WorkerInit):
        loader.worker_init_fn = evolve(start, epoch=epoch)
        loader.generator.manual_seed(mix(start.seed, epoch))  # for get_worker_info().seed
