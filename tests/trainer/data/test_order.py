"""Data orders: equality with the peers they reproduce, seeking, purity, errors."""

from __future__ import annotations

import copy
import os
import pickle
import random
import timeit
from collections.abc import Callable

import numpy as np
import pytest
import torch

from trainer.data import order as orders
from trainer.data.grouped import LengthGrouped
from trainer.data.order import Feistel, Permutation, Sequential
from trainer.data.weighted import Weighted

LENGTHS = [(7 * i * i + 3 * i) % 23 for i in range(101)]
ALL: dict[str, Callable[[], orders.Order]] = {
    "sequential": lambda: Sequential(101),
    "permutation": lambda: Permutation(101, seed=3),
    "feistel": lambda: Feistel(101, seed=3),
    "weighted": lambda: Weighted([1.0 + i for i in range(101)], seed=3),
    "length_grouped": lambda: LengthGrouped(LENGTHS, batch_size=4, seed=3),
}


@pytest.fixture(params=sorted(ALL))
def order(request: pytest.FixtureRequest) -> orders.Order:
    return ALL[request.param]()


def global_states() -> tuple[object, bytes, bytes]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), pickle.dumps(numpy_state), torch.get_rng_state().numpy().tobytes()


# --- what every order promises -----------------------------------------------------------------


def test_indices_are_a_slice_of_the_epoch(order: orders.Order) -> None:
    for epoch in (0, 2, 1):
        whole = order.indices(epoch, 0, len(order))
        assert whole.dtype == torch.int64
        assert whole.ndim == 1
        assert order.indices(epoch, 17, 40).tolist() == whole[17:40].tolist()
        assert order.indices(epoch, 5, 5).tolist() == []


def test_take_accepts_positions_in_any_order(order: orders.Order) -> None:
    whole = order.indices(1, 0, len(order))
    positions = torch.tensor([90, 3, 3, 41])
    assert order.take(1, positions).tolist() == whole[positions].tolist()
    assert positions.tolist() == [90, 3, 3, 41]


def test_position_counts_over_epochs(order: orders.Order) -> None:
    n = len(order)
    for i in (0, n - 1, n, 2 * n + 5):
        assert order.position(i) == order.indices(i // n, i % n, i % n + 1).item()


def test_no_history_matters(order: orders.Order) -> None:
    first = order.indices(0, 0, 50).tolist()
    order.indices(5, 0, 50)
    assert order.indices(0, 0, 50).tolist() == first


def test_global_generators_are_neither_read_nor_moved(order: orders.Order) -> None:
    before = global_states()
    first = order.indices(1, 0, len(order)).tolist()
    assert global_states() == before
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    fresh = copy.deepcopy(order)
    assert fresh.indices(1, 0, len(order)).tolist() == first


def test_the_default_device_does_not_matter(order: orders.Order) -> None:
    expected = order.indices(1, 3, 20).tolist()
    with torch.device("meta"):
        fresh = copy.deepcopy(order)
        assert fresh.indices(1, 3, 20).tolist() == expected
        assert fresh.position(len(order) + 3) == expected[0]


def test_pickles_are_small_and_equal(order: orders.Order) -> None:
    expected = order.indices(1, 0, len(order)).tolist()
    again = pickle.loads(pickle.dumps(order))
    assert again.indices(1, 0, len(order)).tolist() == expected


def test_a_drawn_epoch_is_not_pickled() -> None:
    order = Permutation(100_000, seed=0)
    order.position(0)
    assert len(pickle.dumps(order)) < 1000


def test_wrong_ranges_are_refused(order: orders.Order) -> None:
    with pytest.raises(IndexError, match=r"positions of an epoch lie in \[0, 101\), got 90\.\.101"):
        order.indices(0, 90, 102)
    with pytest.raises(IndexError, match=r"lie in \[0, 101\), got -1\.\.3"):
        order.indices(0, -1, 4)
    with pytest.raises(IndexError, match=r"start must not exceed stop, got 4\.\.3"):
        order.indices(0, 4, 3)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        order.indices(-1, 0, 3)
    with pytest.raises(IndexError, match="got position -1 of 101 samples"):
        order.position(-1)


@pytest.mark.parametrize("empty", [Sequential(0), Permutation(0, 1), Feistel(0, 1)])
def test_an_empty_dataset_has_an_empty_epoch(empty: orders.Order) -> None:
    assert empty.indices(0, 0, 0).tolist() == []
    with pytest.raises(IndexError, match="got position 0 of 0 samples"):
        empty.position(0)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="Permutation: n must be an integer of at least 0, got -1"):
        Permutation(-1, 0)
    with pytest.raises(ValueError, match=r"Sequential: n must be an integer .* got 2\.5"):
        Sequential(2.5)  # type: ignore[arg-type]


# --- permutation --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, -7])
@pytest.mark.parametrize("n", [1, 10, 40_000])
def test_permutation_is_torch_randperm_seeded_with_seed_plus_epoch(n: int, seed: int) -> None:
    for epoch in range(3):
        generator = torch.Generator().manual_seed(seed + epoch)
        expected = torch.randperm(n, generator=generator)
        assert torch.equal(Permutation(n, seed).indices(epoch, 0, n), expected)


def test_permutation_is_the_order_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    sampler = accelerate.SeedableRandomSampler(list(range(57)), data_seed=11)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert Permutation(57, 11).indices(epoch, 0, 57).tolist() == list(sampler)


@pytest.mark.row(48)
@pytest.mark.parametrize("data_seed", [None, 5])
def test_permutation_is_the_order_of_the_hugging_face_trainer(
    data_seed: int | None, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        seed=17,
        data_seed=data_seed,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    data = [{"x": i} for i in range(23)]
    peer = transformers.Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
    loader = peer.get_train_dataloader()
    ours = Permutation(23, 17 if data_seed is None else data_seed)
    for epoch in range(3):
        loader.set_epoch(epoch)
        theirs = torch.cat([batch["x"] for batch in loader])
        assert ours.indices(epoch, 0, 23).tolist() == theirs.tolist()


def test_position_is_the_sample_of_the_default_shuffle() -> None:
    expected = torch.cat([Permutation(13, 4).indices(epoch, 0, 13) for epoch in range(3)])
    assert [orders.position(4, 13, i) for i in range(39)] == expected.tolist()


# --- feistel ------------------------------------------------------------------------------------


def test_feistel_differs_by_epoch_and_seed_and_is_not_the_identity() -> None:
    n = 1000
    drawn = [Feistel(n, seed).indices(epoch, 0, n) for seed in (0, 1) for epoch in (0, 1)]
    drawn.append(torch.arange(n))
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert int((a == b).sum()) < 10  # a random pair agrees in one place on average


def test_feistel_of_three_samples_gives_all_orders_alike() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(3000):
        drawn = tuple(Feistel(3, 9).indices(epoch, 0, 3).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6
    chi_squared = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_squared < 20.5  # the 0.999 quantile with 5 degrees of freedom


def test_feistel_spreads_neighbours() -> None:
    n = 1 << 20
    drawn = Feistel(n, 2).indices(0, 0, 20_000).double()
    gaps = (drawn[1:] - drawn[:-1]).abs() / n
    assert abs(float(gaps.mean()) - 1 / 3) < 0.01  # of two uniform numbers
    correlation = torch.corrcoef(torch.stack([torch.arange(20_000).double(), drawn]))[0, 1]
    assert abs(float(correlation)) < 0.03


def test_feistel_seeks_in_a_billion_samples_at_once() -> None:
    order = Feistel(10**9, seed=0)
    assert min(timeit.repeat(lambda: order.position(10**6), number=1, repeat=5)) < 0.005


def test_feistel_reaches_to_two_to_the_forty() -> None:
    n = 1 << 40
    drawn = Feistel(n, 1).indices(3, n - 1000, n)
    assert len(set(drawn.tolist())) == 1000
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < n
    with pytest.raises(ValueError, match=r"n must be at most 2\*\*40 = 1099511627776, got 1099511"):
        Feistel(n + 1, 1)


def test_feistel_order_is_fixed_for_good() -> None:
    """A changed order would break the resume of every run that uses it."""
    assert Feistel(10, 0).indices(0, 0, 10).tolist() == [8, 0, 4, 7, 5, 2, 1, 6, 9, 3]
    far = [Feistel(10**9, 7).position(10**9 + i) for i in range(3)]
    assert far == [866897973, 396975714, 77339170]
