"""Streams: how iterable datasets are cut into batches, and shared by ranks and workers."""

import logging
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from support.shell import flat
from support.streams import (
    KINDS,
    Divided,
    DividedSaved,
    Epochs,
    N,
    Numbers,
    Saved,
    Sized,
    drawn,
    feed,
    kept,
    noisy,
    numbers,
)
from trainer.data.iterable import Stream
from trainer.data.loader import is_iterable
from trainer.data.places import Place, Shard
from trainer.data.seeded import SeededCollator
from trainer.data.stream_loader import StreamLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

CHUNKS = [list(range(start, min(start + 3, N))) for start in range(0, N, 3)]


def batches(dataset: Any, size: int = 3, workers: int = 0, **options: Any) -> list[Any]:
    """All batches of one pass; None for an empty share."""
    stream = Stream(dataset, size, seed=7, **options)
    return list(StreamLoader(stream, SeededCollator(noisy), num_workers=workers))


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the code under test believe that it runs in a worker process."""

    def pretend(worker: int, workers: int) -> None:
        info = SimpleNamespace(id=worker, num_workers=workers, seed=5, dataset=None)
        monkeypatch.setattr("torch.utils.data._utils.worker._worker_info", info)

    return pretend


# ---- batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_cut_into_batches(kind: Any) -> None:
    assert numbers(batches(kind())) == CHUNKS
    assert numbers(batches(kind(), drop_last=True)) == CHUNKS[:-1]
    assert numbers(batches(kind(21), drop_last=True)) == CHUNKS[:-1]
    assert batches(kind(0)) == []


def test_lengths() -> None:
    def made(dataset: Any, **options: Any) -> StreamLoader:
        return StreamLoader(Stream(dataset, 3, seed=7, **options), noisy)

    assert (len(made(Sized())), len(made(Sized(), drop_last=True))) == (8, 7)
    assert (len(made(Sized(), world_size=2)), len(made(Sized(21)))) == (4, 7)
    assert len(made(Sized()).dataset) == N
    with pytest.raises(TypeError):
        len(made(Numbers()))


def test_anything_that_iterates_is_read() -> None:
    class NoBase:
        def __iter__(self) -> Iterator[Any]:
            return iter([(i, 0.0) for i in range(4)])

    assert is_iterable(NoBase())
    assert numbers(batches(NoBase())) == [[0, 1, 2], [3]]
    once = iter([(i, 0.0) for i in range(4)])
    assert numbers(batches(once, 2)) == [[0, 1], [2, 3]]
    assert batches(once) == []


# ---- randomness


def test_samples_and_batches_are_functions_of_seed_epoch_and_number(tmp_path: Path) -> None:
    ours = feed(tmp_path, Numbers())
    first = list(ours(0, 0))
    drawn()
    assert list(ours(0, 0)) == first
    assert list(feed(tmp_path, Numbers(), data_seed=42)(0, 0)) == first
    others = [list(ours(1, 0)), list(feed(tmp_path, Numbers(), data_seed=1)(0, 0))]
    noises = [{*flat(b[1] for b in one), *(b[2] for b in one)} for one in (first, *others)]
    assert [len(noise) for noise in noises] == [N + len(CHUNKS)] * 3
    assert not noises[0] & noises[1] | noises[0] & noises[2] | noises[1] & noises[2]


def test_reading_leaves_the_generators_alone(tmp_path: Path) -> None:
    random.seed(1), torch.manual_seed(1)
    expected = random.random(), float(torch.rand(()))
    random.seed(1), torch.manual_seed(1)
    list(feed(tmp_path, Numbers())(0, 0))
    assert (random.random(), float(torch.rand(()))) == expected


def test_seeding_can_be_switched_off(tmp_path: Path) -> None:
    class Plain(Numbers):
        deterministic = True

    random.seed(3), torch.manual_seed(3)
    first = list(feed(tmp_path, Plain())(0, 0))
    assert [batch[1] for batch in list(feed(tmp_path, Plain())(0, 0))] != [b[1] for b in first]


def test_what_is_shuffled_before_the_first_sample_is_shuffled_alike_in_all_workers() -> None:
    class Shuffling(Divided):
        def __iter__(self) -> Iterator[Any]:
            order = list(range(self.n))
            random.shuffle(order)
            yield from (self.give(order[i]) for i in self.mine())

    seen = flat(numbers(batches(Shuffling(), workers=2)))
    assert sorted(seen) == list(range(N))
    assert seen != list(range(N))


# ---- workers


@pytest.mark.parametrize("kind", [Numbers, Sized, Saved, Epochs])
def test_workers_take_turns_in_data_that_are_the_same_for_all(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Same batches, same bits, no duplicates, whatever the number of workers."""
    alone = batches(kind())
    assert not caplog.records
    for workers in (1, 2, 3):
        caplog.clear()
        assert batches(kind(), workers=workers) == alone
        told = [record.message for record in caplog.records]
        assert len(told) == (workers > 1)
    assert (
        "gives all 3 workers the same samples. Each reads all of them and keeps one batch"
        in (told[0])
    )


@pytest.mark.parametrize("kind", [Divided, DividedSaved])
def test_data_that_divide_themselves_come_as_from_torchs_loader(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for workers in (1, 2, 3):
        theirs = DataLoader(kind(), 3, collate_fn=noisy, num_workers=workers)
        ours = numbers(batches(kind(), workers=workers))
        assert ours == numbers(theirs)
        assert sorted(flat(ours)) == list(range(N))
    assert not caplog.records


def test_a_dataset_can_say_what_it_does(in_worker: Any) -> None:
    class Silent(Numbers):
        shards_workers = True  # by other means

    class Asking(Numbers):
        shards_workers = False

        def __iter__(self) -> Iterator[Any]:
            get_worker_info().id  # noqa: B018
            return super().__iter__()

    in_worker(1, 2)
    for kind, expected in ((Silent, CHUNKS), (Asking, CHUNKS[1::2])):
        pairs = list(Stream(kind(), 3, seed=7))
        assert [[i for i, _ in samples] for samples, _ in pairs if samples] == expected


def test_asking_late_is_an_error(in_worker: Any) -> None:
    class Late(Numbers):
        def __iter__(self) -> Iterator[Any]:
            for i in range(N):
                if i == 5:
                    get_worker_info().num_workers  # noqa: B018
                yield (i, 0.0)

    in_worker(0, 2)
    with pytest.raises(RuntimeError, match=r"Late asked get_worker_info\(\) .* after 6 samples"):
        list(Stream(Late(), 3, seed=7))


def test_collators_may_ask_too() -> None:
    """They run in the same process, between the samples."""

    def asking(rows: list[Any]) -> Any:
        info: Any = get_worker_info()
        return (*noisy(rows), info.id)

    loader = StreamLoader(Stream(Numbers(), 3, seed=7), asking, num_workers=2)
    read = list(loader)
    assert numbers(read) == CHUNKS
    assert [batch[-1] for batch in read] == [0, 1] * 4


def test_what_a_dataset_learns_of_its_worker(in_worker: Any) -> None:
    seen = []

    class Curious(Numbers):
        def __iter__(self) -> Iterator[Any]:
            info: Any = get_worker_info()
            seen.append((info.id, info.num_workers, info.seed, info.dataset is self))
            return super().__iter__()

    in_worker(1, 2)
    stream = Stream(Curious(), 3, seed=7)
    for _ in range(2):
        list(stream)
    assert seen == [(1, 2, 5, True)] * 2


def test_the_place_of_a_single_reader_is_not_one_of_divided_data(in_worker: Any) -> None:
    place = Place(0, 2, None, 0, [Shard(9)])
    for kind in (Divided, DividedSaved):
        for worker in range(2):
            in_worker(worker, 2)
            stream = Stream(kind(), 3, seed=7)
            stream.start = place
            with pytest.raises(
                ValueError, match=r"written with a single reader .* among 2 workers"
            ):
                list(stream)


def test_workers_without_data_end_at_once() -> None:
    class Few(Divided):
        def mine(self) -> list[int]:
            info: Any = get_worker_info()
            return list(range(5)) if info is None or info.id == 1 else []

    assert numbers(batches(Few(), workers=3)) == [[0, 1, 2], [3, 4]]


@pytest.mark.row(60)
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_told_every_epoch(persistent: bool, tmp_path: Path) -> None:
    ours = feed(
        tmp_path,
        Epochs(),
        dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
    )
    for epoch in (0, 3, 1):
        assert numbers(ours(epoch, 0))[0] == [100 * epoch + i for i in range(3)]


# ---- ranks


@pytest.mark.row(60)
@pytest.mark.parametrize("kind", [Numbers, Saved])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_every_global_batch(kind: Any, workers: int) -> None:
    """The batches of all ranks, dealt out in turn, are those of one; ends are short or empty."""
    alone = batches(kind())
    for ranks in (2, 3):
        shares = [
            batches(kind(), workers=workers, rank=rank, world_size=ranks) for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        dealt = [batch for turn in zip(*shares, strict=True) for batch in turn]
        assert [batch and batch[:2] for batch in dealt if batch] == [b[:2] for b in alone]
    assert shares[2][-1] is None


def test_ranks_drop_an_incomplete_global_batch() -> None:
    shares = [batches(Numbers(), rank=rank, world_size=2, drop_last=True) for rank in range(2)]
    assert [numbers(share) for share in shares] == [CHUNKS[0:6:2], CHUNKS[1:6:2]]


def test_ranks_go_on_together_and_with_another_number_of_them() -> None:
    def reading(rank: int, ranks: int, start: Place | None = None) -> tuple[Any, StreamLoader]:
        loader = StreamLoader(Stream(Saved(), 3, seed=7, rank=rank, world_size=ranks), noisy)
        loader.go_to(start)
        return iter(loader), loader

    places = []
    for rank in range(2):
        read, loader = reading(rank, 2)
        list(islice(read, 2))
        places.append(loader.place.to_json())
    assert places[0] == places[1]
    rest = numbers(reading(0, 1, Place.from_json(places[0]))[0])
    assert rest == CHUNKS[4:]


def test_data_that_ranks_divide_themselves_are_not_cut_again() -> None:
    class OfRank(Numbers):
        shards_ranks = True

    stream = batches(OfRank(), rank=1, world_size=2)
    assert numbers(stream) == CHUNKS
    other = batches(OfRank(), rank=0, world_size=2)
    assert stream[0][1][0] == other[0][1][0]  # what precedes the first sample is alike
    assert not {*flat(b[1] for b in stream)[1:]} & {*flat(b[1] for b in other)}


# ---- datasets


def rows(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from ({"a": i} for i in range(shard, N, 4))


def table() -> Any:
    """A streaming dataset of four shards."""
    datasets = pytest.importorskip("datasets")
    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})


def listed(read: Any) -> list[Any]:
    return [batch["a"].tolist() for batch in read]


def table_feed(folder: Path, dataset: Any, **changes: Any) -> Any:
    from trainer.data.collators import default_data_collator

    ours = feed(folder, dataset, **changes)
    object.__setattr__(ours.loader.collate_fn, "collate", SeededCollator(default_data_collator))
    return ours


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_streaming_dataset_goes_on_exactly(
    workers: int, shuffled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after ``shuffle``, whose buffer its own state leaves out."""

    def made() -> Any:
        dataset = table().shuffle(seed=1, buffer_size=6) if shuffled else table()
        return table_feed(tmp_path, dataset, dataloader_num_workers=workers)

    whole = made()
    first, second = listed(whole(0, 0)), listed(whole(1, 0))
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(N))
    assert (first != second) is shuffled
    for epoch, expected in enumerate((first, second)):
        for done in (0, 2, 5, len(expected)):
            ours = made()
            for before in range(epoch):
                listed(ours(before, 0))
            listed(islice(ours(epoch, 0), done))
            again = made()
            again.load(kept(ours, epoch) if done else None)
            assert listed(again(epoch, done)) == expected[done:], (epoch, done)
    assert ("read again and dropped" in caplog.text) is shuffled


def test_a_streaming_dataset_split_by_node_is_not_cut_again(tmp_path: Path) -> None:
    distributed = pytest.importorskip("datasets.distributed")
    node = distributed.split_dataset_by_node(table(), rank=1, world_size=2)
    stream = Stream(node, 3, seed=7, rank=1, world_size=2)
    assert stream.shards_ranks
    samples = [row["a"] for rows, _ in stream if rows for row in rows]
    assert samples == [row["a"] for row in node]


def test_no_log_is_kept_of_reading_without_a_hitch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        batches(Saved())
    assert not caplog.records


class Drawing(IterableDataset):
    """Samples drawn from the worker's generators, nothing else."""

    def __iter__(self) -> Any:
        return iter([(0, float(torch.rand(()))) for _ in range(3)])


def test_what_is_drawn_all_at_once_differs_by_epoch_too(tmp_path: Path) -> None:
    for workers in (0, 1):
        ours = feed(tmp_path, Drawing(), dataloader_num_workers=workers)
        passes = [[batch[1] for batch in ours(epoch, 0)] for epoch in (0, 1, 0)]
        assert passes[0] == passes[2] != passes[1]
