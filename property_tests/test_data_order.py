"""Properties of data order: bijections, batches that do not depend on ranks, exact seeking."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.grouped import LengthGrouped
from trainer.data.order import Feistel, Order, Permutation, position
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.seeding import mix, splitmix64

SEEDS = st.integers(-(2**31), 2**63 - 100)
EPOCHS = st.integers(0, 50)


@st.composite
def orders(draw: st.DrawFn, max_n: int = 120) -> Order:
    n, seed = draw(st.integers(1, max_n)), draw(SEEDS)
    kind = draw(st.sampled_from(["permutation", "feistel", "length_grouped"]))
    if kind == "permutation":
        return Permutation(n, seed)
    if kind == "feistel":
        return Feistel(n, seed)
    lengths = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    return LengthGrouped(lengths, draw(st.integers(1, 8)), seed)


def flat(sampler: GlobalBatchSampler) -> list[list[tuple[int, int]]]:
    return [batch for batch in sampler if batch]


@given(st.integers(1, 4000), SEEDS, EPOCHS)
@settings(deadline=None)
def test_feistel_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(Feistel(n, seed).indices(epoch, 0, n).tolist()) == list(range(n))


@given(st.integers(2, 2**40), SEEDS, EPOCHS, st.data())
@settings(deadline=None)
def test_feistel_ranges_agree_with_single_positions(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = min(n, start + 5)
    order = Feistel(n, seed)
    drawn = order.indices(epoch, start, stop).tolist()
    assert len(set(drawn)) == stop - start
    assert all(0 <= index < n for index in drawn)
    assert drawn == [order.position(epoch * n + i) for i in range(start, stop)]


@given(orders(), EPOCHS)
@settings(deadline=None)
def test_every_sample_once_an_epoch(order: Order, epoch: int) -> None:
    n = len(order)
    assert sorted(order.indices(epoch, 0, n).tolist()) == list(range(n))


@given(st.integers(1, 200), SEEDS, st.integers(0, 1000))
@settings(deadline=None)
def test_position_agrees_with_the_permutation(n: int, seed: int, i: int) -> None:
    assert position(seed, n, i) == Permutation(n, seed).indices(i // n, 0, n)[i % n]


@given(orders(), st.integers(1, 9), st.integers(1, 6), EPOCHS)
@settings(deadline=None)
def test_batches_do_not_depend_on_the_number_of_ranks(
    order: Order, batch_size: int, ranks: int, epoch: int
) -> None:
    alone = flat(GlobalBatchSampler(order, batch_size, epoch=epoch))
    samplers = [
        GlobalBatchSampler(order, batch_size, ranks, rank, epoch=epoch) for rank in range(ranks)
    ]
    turns = zip(*samplers, strict=True)
    assert [batch for turn in turns for batch in turn if batch] == alone


@given(orders(), st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_run_on_changing_numbers_of_ranks_sees_every_batch_once(
    order: Order, batch_size: int, worlds: list[int]
) -> None:
    """Each world trains one global batch and hands its position on; the last one finishes."""
    alone = flat(GlobalBatchSampler(order, batch_size))
    seen, sample = [], 0
    for number, ranks in enumerate(worlds):
        last = number == len(worlds) - 1
        turns = []
        for rank in range(ranks):
            sampler = GlobalBatchSampler(order, batch_size, ranks, rank)
            sampler.seek(0, sample)
            turns.append(list(sampler) if last else list(sampler)[:1])
        seen += [batch for turn in zip(*turns, strict=True) for batch in turn if batch]
        sample = min(len(order), sample + batch_size * ranks)
    assert seen == alone


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_splitmix64_is_injective(a: int, b: int) -> None:
    assert (splitmix64(a) == splitmix64(b)) == (a == b)


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_mix_gives_64_bits(ints: list[int]) -> None:
    assert 0 <= mix(*ints) < 2**64
