"""Feeds: a run goes on in its data where it stood, whatever they are and however they are read."""

import copy
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from support.full import FULL
from support.shell import make_args
from support.streams import (
    KINDS,
    Divided,
    DividedSaved,
    Epochs,
    Itself,
    Numbers,
    Saved,
    Sized,
    drawn,
    feed,
    kept,
    noisy,
    numbers,
)
from trainer.data.feed import DataWait, Feed, batches_from
from trainer.data.loader import make_loader
from trainer.data.order import Sequential

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

PASSES = 3
STATELESS = (Numbers, Sized, Divided)


def whole_run(folder: Path, make: Callable[[], Numbers], **changes: Any) -> Any:
    """The batches of all passes, and the states after each batch and each pass."""
    ours = feed(folder, make(), **changes)
    batches, states = [], []
    for epoch in range(PASSES):
        batches.append([])
        for batch in ours(epoch, 0):
            batches[-1].append(batch)
            states.append((epoch, len(batches[-1]), kept(ours, epoch)))
        states.append((epoch + 1, 0, kept(ours, epoch + 1)))
    return batches, states


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("number", [0, 2, 3] if FULL else [0, 2])
def test_a_run_goes_on_with_the_same_bits_from_anywhere(
    make: Callable[[], Numbers], number: int, tmp_path: Path
) -> None:
    workers = {"dataloader_num_workers": number}
    batches, states = whole_run(tmp_path, make, **workers)
    chosen = states if FULL or not number else states[1::4]
    assert any(batch == 0 for _, batch, _ in chosen)
    for epoch, done, state in chosen:
        if epoch == PASSES:
            continue
        again = feed(tmp_path, make(), **workers)
        drawn()
        again.load(state)
        rest = [list(again(epoch, done)), *(list(again(e, 0)) for e in range(epoch + 1, PASSES))]
        assert rest == [batches[epoch][done:], *batches[epoch + 1 :]], (epoch, done)


@pytest.mark.parametrize("make", [Saved, Epochs, DividedSaved])
def test_workers_that_live_on_go_on_too(make: Callable[[], Numbers], tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    batches, states = whole_run(tmp_path, make, **workers)
    for epoch, done, state in states[2::5]:
        again = feed(tmp_path, make(), **workers)
        again.load(state)
        rest = [list(again(epoch, done)), *(list(again(e, 0)) for e in range(epoch + 1, PASSES))]
        assert rest == [batches[epoch][done:], *batches[epoch + 1 :]], (epoch, done)
    if make is not DividedSaved:
        assert numbers(batches[2])[0] == [200, 201, 202]  # it has seen every epoch


@pytest.mark.parametrize("make", KINDS)
def test_a_state_is_kept_of_what_was_given_not_of_what_was_read(
    make: Callable[[], Numbers], tmp_path: Path
) -> None:
    """However far workers read ahead, the state after a batch is the same."""
    near = feed(tmp_path, make(), dataloader_num_workers=2, dataloader_prefetch_factor=1)
    far = feed(tmp_path, make(), dataloader_num_workers=2, dataloader_prefetch_factor=4)
    for one, other in zip(near(0, 0), far(0, 0), strict=True):
        assert one == other
        assert kept(near, 0) == kept(far, 0)


@pytest.mark.parametrize("make", KINDS)
def test_only_data_without_a_state_are_read_again(
    make: Callable[[], Numbers], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = feed(tmp_path, make())
    list(islice(first(0, 0), 4))
    dataset = make()
    again = feed(tmp_path, dataset)
    again.load(kept(first, 0))
    with caplog.at_level(logging.WARNING):
        next(again(0, 4))

    if make in STATELESS:
        assert dataset.reads == list(range(15))
        assert "cannot seek: 4 batches are read again and dropped" in caplog.text
        assert "give the dataset state_dict() and load_state_dict()" in caplog.text
    else:
        assert dataset.reads == [12, 13, 14]
        assert not caplog.records


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("persistent", [None, True, False])
def test_what_an_epoch_left_over_does_not_turn_up_in_the_next(
    make: Callable[[], Numbers], persistent: bool | None, tmp_path: Path
) -> None:
    workers: dict[str, Any] = {}
    if persistent is not None:
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    ours = feed(tmp_path, make(), **workers)
    for epoch in (0, 1):
        assert len(list(islice(ours(epoch, 0), 2))) == 2
    third = list(ours(2, 0))
    state = kept(ours, 2)
    expected = set(range(22)) if make is not Epochs else {200 + i for i in range(22)}
    assert {i for batch in numbers(third) for i in batch} == expected

    short = feed(tmp_path, make(), **workers)
    list(islice(short(1, 0), 2))
    again = feed(tmp_path, make(), **workers)
    again.load(kept(short, 2))  # the epoch was left, the next is to begin
    assert list(again(2, 0)) == third
    assert kept(again, 2) == state


def test_an_epoch_stopped_after_its_last_batch_is_over(tmp_path: Path) -> None:
    """Nobody asked for a batch more, so the dataset has not noticed its end yet."""

    class SizedSaved(Saved):
        def __len__(self) -> int:
            return self.n

    for stopped in (False, True):
        ours = feed(tmp_path, SizedSaved(), size=11)
        assert len(list(islice(ours(0, 0), 2 if stopped else None))) == 2
        state = kept(ours, 1)
        assert numbers(ours(1, 0))[0][0] == 100
        again = feed(tmp_path, SizedSaved(), size=11)
        again.load(state)
        assert numbers(again(1, 0))[0][0] == 100


def test_another_number_of_workers(tmp_path: Path) -> None:
    """Data that are the same for all workers go on with any; those that are divided cannot."""
    for make in (Numbers, Saved):
        first = feed(tmp_path, make(), dataloader_num_workers=2)
        list(islice(first(0, 0), 3))
        rest = list(islice(first(0, 3), 2)) if make is Numbers else None
        for workers in (0, 1, 3):
            again = feed(tmp_path, make(), dataloader_num_workers=workers)
            again.load(kept(first, 0) if make is Saved else None)
            got = list(again(0, 3))
            assert numbers(got)[0] == [9, 10, 11]
            assert rest is None or got[:2] == rest

    for make in (Divided, DividedSaved):
        first = feed(tmp_path, make(), dataloader_num_workers=2)
        list(islice(first(0, 0), 3))
        again = feed(tmp_path, make(), dataloader_num_workers=3)
        again.load(kept(first, 0))
        with pytest.raises(
            ValueError, match=r"with dataloader_num_workers=2, among .* with 3\. Set"
        ):
            next(again(0, 3))


@pytest.mark.parametrize("make", [Saved, DividedSaved])
def test_new_workers_begin_every_epoch_with_the_dataset_as_it_is(
    make: Callable[[], Numbers], tmp_path: Path
) -> None:
    """So between two epochs there is nothing to keep, and the number of workers may change."""
    workers = {"dataloader_num_workers": 2}
    ours, single = feed(tmp_path, make(), **workers), feed(tmp_path, make())
    list(ours(0, 0)), list(single(0, 0))
    assert kept(ours, 1) is None
    assert kept(single, 1) is not None
    expected = list(ours(1, 0))
    again = feed(tmp_path, make(), **workers)
    again.load(kept(single, 1))
    assert list(again(1, 0)) == expected


def test_a_state_of_another_epoch_is_not_used(tmp_path: Path) -> None:
    ours = feed(tmp_path, Saved())
    list(islice(ours(0, 0), 3))
    again = feed(tmp_path, Saved())
    again.load(kept(ours, 0))
    assert kept(again, 0) == kept(ours, 0)  # saved again before anything was read
    assert again.state(1) is None
    assert numbers(again(1, 0))[0] == [0, 1, 2]


def test_a_checkpoint_without_a_state_is_reached_by_counting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for make in (Saved, Divided):
        for workers in (0, 2):
            whole = list(feed(tmp_path, make(), dataloader_num_workers=workers)(0, 0))
            again = feed(tmp_path, make(), dataloader_num_workers=workers)
            again.load(None)
            assert list(again(0, 4)) == whole[4:]
    assert caplog.text.count("4 batches are read again") == 4


def test_a_state_that_cannot_be_kept_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Itself):
        def state_dict(self) -> dict[str, Any]:
            return {"open": [object()]}

    whole = list(feed(tmp_path, Odd())(0, 0))
    ours = feed(tmp_path, Odd())
    list(islice(ours(0, 0), 2))
    assert caplog.text.count("The state of Odd is not kept in checkpoints") == 2
    assert "dataset['open'][0] is a object, which a checkpoint cannot hold" in caplog.text
    again = feed(tmp_path, Odd())
    again.load(kept(ours, 0))
    assert list(again(0, 2)) == whole[2:]
    assert "2 batches are read again" in caplog.text


# ---- loaders of others


class Loader:
    """A loader with a state, as torchdata's StatefulDataLoader is."""

    def __init__(self) -> None:
        self.at = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        while self.at < 6:
            self.at += 1
            yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_loader_with_a_state_goes_on() -> None:
    ours = Feed(Loader())
    assert list(islice(ours(4, 0), 2)) == [1, 2]
    loader = Loader()
    again = Feed(loader)
    again.load(kept(ours, 4))
    assert list(again(4, 2)) == [3, 4, 5, 6]
    assert loader.epochs == [4]
    assert again.state(5) == {"epoch": 5, "loader": {"at": 0}}
    again.load(kept(ours, 4))
    assert list(again(5, 0)) == [1, 2, 3, 4, 5, 6]  # that was another epoch's


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_goes_on(tmp_path: Path) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def made(workers: int) -> Feed:
        generator = torch.Generator().manual_seed(3)
        loader = torchdata.StatefulDataLoader(
            list(range(20)), batch_size=3, shuffle=True, num_workers=workers, generator=generator
        )
        return Feed(loader)

    def listed(batches: Any) -> list[list[int]]:
        return [batch.tolist() for batch in batches]

    for workers in (0, 2):
        whole = made(workers)
        batches = [listed(whole(epoch, 0)) for epoch in range(2)]
        for done in (2, 6):
            first = made(workers)
            listed(islice(first(0, 0), done))
            again = made(workers)
            again.load(kept(first, 0))
            assert listed(again(0, done)) == batches[0][done:]
            if workers:  # without, the loader itself does not go on with the same next epoch
                assert listed(again(1, 0)) == batches[1]


def test_others_are_told_the_epoch_and_read_over_to_the_position(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sampler(torch.utils.data.RandomSampler):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Sampler(range(4))
    made = DataLoader(range(4), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    list(batches_from(made, 5, 0))
    assert sampler.epoch == 5
    assert [list(batch) for batch in batches_from([[1], [2], [3]], 0, 2)] == [[3]]
    assert "cannot seek: 2 batches are read again and dropped" in caplog.text


def test_reading_again_shows_a_bar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    list(batches_from([[1], [2], [3]], 0, 2, show=True))
    assert "Reading again: 100%" in capsys.readouterr().err
    for quiet in (False, True):
        first = feed(tmp_path, Numbers())
        list(islice(first(0, 0), 4))
        again = feed(tmp_path, Numbers(), disable_tqdm=quiet)
        again.load(kept(first, 0))
        next(again(0, 4))
        shown = capsys.readouterr().err
        assert ("Reading again: 100%" in shown and "12/12" in shown) is not quiet


# ---- map-style data


def rows(folder: Path, **changes: Any) -> Feed:
    args = make_args(folder, **changes)
    data = [(i, 0.0) for i in range(10)]
    return Feed(make_loader(data, noisy, args, batch_size=2, order=Sequential(10)))


def test_map_style_data_need_no_state(tmp_path: Path) -> None:
    ours = rows(tmp_path)
    whole = list(ours(1, 0))
    assert (ours.state(1), ours.state(2)) == (None, None)
    ours.load(None)
    assert list(ours(1, 3)) == whole[3:]


def test_in_the_main_process_generators_are_lent_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = []
    from trainer.data import seeding

    lend = seeding._lend_numpy
    monkeypatch.setattr(seeding, "_lend_numpy", lambda: lent.append(1) or lend())
    assert len(list(rows(tmp_path)(0, 0))) == 5
    assert len(lent) == 6  # one for noticing the end
    list(rows(tmp_path, dataloader_num_workers=1)(0, 0))
    assert len(lent) == 6


# ---- waiting


def test_the_wait_for_data_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow() -> Any:
        for seconds in (1.0, 2.0, 4.0):
            now[0] += seconds
            yield seconds

    monkeypatch.setattr("trainer.data.feed.perf_counter", lambda: now[0])
    seen: list[float] = []

    def watched(batches: Any) -> Any:
        for batch in batches:
            seen.append(batch)
            yield batch

    ours = Feed(slow(), watched)
    batches = ours(0, 0)
    next(batches)
    now[0] += 100.0  # training
    assert ours.wait.take() == 1.0
    assert list(batches) == [2.0, 4.0]
    assert (ours.wait.take(), ours.wait.take()) == (6.0, 0.0)
    assert (ours.wait.seconds, ours.wait.batches) == (7.0, 3)
    assert seen == [1.0, 2.0, 4.0]
    assert DataWait().take() == 0.0


def test_a_state_does_not_change_while_training_goes_on(tmp_path: Path) -> None:
    ours = feed(tmp_path, DividedSaved(), dataloader_num_workers=2)
    batches = ours(0, 0)
    next(batches), next(batches)
    state = ours.state(0)
    before = copy.deepcopy(state)
    list(batches)
    assert state == before
