"""The split of the global batch: accelerate's batches, every sample once, seeking, errors."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler

from trainer.data.order import Feistel, Permutation, Sequential
from trainer.data.sampler import GlobalBatchSampler

SIZES = [1, 2, 3, 5, 8, 9, 12, 13, 24, 25]


def indices(sampler: GlobalBatchSampler) -> list[list[int]]:
    return [[index for _, index in batch] for batch in sampler]


def shares(n: int, batch_size: int, ranks: int, **options: Any) -> list[list[list[int]]]:
    order = Sequential(n)
    return [
        indices(GlobalBatchSampler(order, batch_size, ranks, rank, **options))
        for rank in range(ranks)
    ]


def joined(batches: Iterable[list[Any]]) -> list[Any]:
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
def test_ranks_get_the_batches_of_accelerate(
    ranks: int, drop_last: bool, even_batches: bool
) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    for n in SIZES:
        ours = shares(n, 3, ranks, drop_last=drop_last, even_batches=even_batches)
        for rank in range(ranks):
            theirs = accelerate.BatchSamplerShard(
                BatchSampler(range(n), 3, drop_last), ranks, rank, even_batches=even_batches
            )
            # Where accelerate gives a rank nothing, ours gets an empty batch: all ranks count alike.
            assert [batch for batch in ours[rank] if batch] == list(theirs)
            assert len({len(share) for share in ours}) == 1


@pytest.mark.parametrize("n", SIZES)
def test_every_sample_once_in_the_same_batches_on_any_number_of_ranks(n: int) -> None:
    [alone] = shares(n, 2, 1)
    assert joined(alone) == list(range(n))
    for ranks in (2, 3, 4):
        turns = zip_longest(*shares(n, 2, ranks))
        assert [batch for turn in turns for batch in turn if batch] == alone


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("even_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_length_is_the_number_of_batches(n: int, even_batches: bool, drop_last: bool) -> None:
    for ranks in (1, 3):
        for rank in range(ranks):
            sampler = GlobalBatchSampler(
                Sequential(n), 2, ranks, rank, drop_last, even_batches=even_batches
            )
            expected = n // (2 * ranks) if drop_last else -(-n // (2 * ranks))
            assert len(list(sampler)) == len(sampler) == sampler.remaining == expected


@pytest.mark.parametrize("n", SIZES)
def test_repeated_counts_what_even_batches_added(n: int) -> None:
    kept = []
    for rank in range(3):
        sampler = GlobalBatchSampler(Sequential(n), 2, 3, rank, even_batches=True)
        for number, batch in enumerate(indices(sampler)):
            kept += batch[: len(batch) - sampler.repeated(number)]
    assert sorted(kept) == list(range(n))
    assert GlobalBatchSampler(Sequential(n), 2, 3, 2).repeated(0) == 0


def test_samples_carry_the_epoch_and_follow_the_order() -> None:
    order = Permutation(10, 3)
    sampler = GlobalBatchSampler(order, 4, epoch=2)
    expected = [(2, index) for index in order.indices(2, 0, 10).tolist()]
    assert joined(sampler) == expected
    assert all(type(index) is int for _, index in joined(sampler))
    sampler.set_epoch(3)
    assert joined(sampler) == [(3, index) for index in order.indices(3, 0, 10).tolist()]


def test_blocks_do_not_show() -> None:
    order = Feistel(30_000, 1)
    got = indices(GlobalBatchSampler(order, 7, 2, 1))
    flat = order.indices(0, 0, 30_000).tolist()
    expected = [flat[start : start + 7] for start in range(7, 30_000, 14)]
    assert got == expected
    big = GlobalBatchSampler(order, 10_000)
    assert indices(big) == [flat[:10_000], flat[10_000:20_000], flat[20_000:]]


@pytest.mark.parametrize("even_batches", [False, True])
def test_seeking_gives_the_rest_of_the_epoch(even_batches: bool) -> None:
    order = Permutation(23, 0)
    for rank in range(2):
        sampler = GlobalBatchSampler(order, 3, 2, rank, epoch=1, even_batches=even_batches)
        whole = list(sampler)
        for batch in range(len(whole) + 1):
            sampler.set_position(1, batch)
            assert list(sampler) == whole[batch:]
            assert sampler.remaining == len(whole) - batch
            assert len(sampler) == len(whole)
        options: dict[str, Any] = {"epoch": 1, "start_batch": 2, "even_batches": even_batches}
        assert list(GlobalBatchSampler(order, 3, 2, rank, **options)) == whole[2:]


def test_seeking_translates_no_position_that_was_seen() -> None:
    class Recording(Sequential):
        low = 1 << 60

        def take(self, epoch: int, positions: torch.Tensor) -> torch.Tensor:
            Recording.low = min(Recording.low, int(positions.min()))
            return super().take(epoch, positions)

    sampler = GlobalBatchSampler(Recording(10**9), 4, 2, 0, start_batch=10**6)
    assert next(iter(sampler)) == [(0, 8 * 10**6 + i) for i in range(4)]
    assert Recording.low == 8 * 10**6


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    order = Permutation(50, 7)
    alone = indices(GlobalBatchSampler(order, 2))
    one = GlobalBatchSampler(order, 2, start_batch=3)
    state = one.state_dict()
    assert state == {"epoch": 0, "start_sample": 6}
    rest = []
    for rank in range(4):
        sampler = GlobalBatchSampler(order, 2, 4, rank)
        sampler.load_state_dict(state)
        assert len(list(sampler)) == sampler.remaining
        rest.append(indices(sampler))
    dealt = [batch for turn in zip(*rest, strict=True) for batch in turn if batch]
    assert dealt == alone[3:]


def test_iterating_moves_nothing_and_copies_go_on_from_the_position() -> None:
    sampler = GlobalBatchSampler(Permutation(10, 1), 3, start_batch=1)
    first = list(sampler)
    assert list(sampler) == first
    assert list(pickle.loads(pickle.dumps(sampler))) == first


def test_an_empty_order_has_no_batches() -> None:
    for even_batches in (False, True):
        sampler = GlobalBatchSampler(Sequential(0), 3, even_batches=even_batches)
        assert (len(sampler), list(sampler)) == (0, [])


def test_numbers_out_of_range() -> None:
    order = Sequential(10)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        GlobalBatchSampler(order, 0)
    with pytest.raises(ValueError, match="num_replicas must be at least 1, got -1"):
        GlobalBatchSampler(order, 1, -1)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, num_replicas=2\), got 2"):
        GlobalBatchSampler(order, 1, 2, 2)
    with pytest.raises(ValueError, match=r"has 4 batches, .* lies in \[0, 4\], got 5"):
        GlobalBatchSampler(order, 3, start_batch=5)
    with pytest.raises(ValueError, match=r"a sample in \[0, 10\], got epoch 0 and sample 11"):
        GlobalBatchSampler(order, 3).seek(0, 11)
    with pytest.raises(ValueError, match="got epoch -1 and sample 0"):
        GlobalBatchSampler(order, 3, epoch=-1)
