"""Per-sample seeding: same bits with any workers, nothing moved outside."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from trainer.data.columns import FilteringCollator
from trainer.data.order import Permutation
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.seeded import SeededCollator, SeededDataset
from trainer.data.seeding import mix

N = 22


def draws() -> list[float]:
    """One number of each global generator, and of the normal deviates that NumPy and Python keep."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def states() -> tuple[Any, ...]:
    numpy_state = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy_state, torch_state, torch.initial_seed()


class Augmented:
    """Every sample draws from the three generators; some draw more than others."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> list[float]:
        for _ in range(index % 3):
            draws()
        return [float(index), *draws()]


class Table(Augmented):
    """Like a ``datasets.Dataset``: it has columns, a format, and fetches batches at once."""

    column_names = ("x",)

    def __init__(self, format_type: str | None) -> None:
        self.format = {"type": format_type}
        self.batches = 0

    def __getitems__(self, indices: list[int]) -> list[list[float]]:
        self.batches += 1
        return [[float(index)] for index in indices]


def noisy_collate(samples: list[list[float]]) -> torch.Tensor:
    noise = torch.tensor(draws())
    return torch.cat([torch.tensor(samples, dtype=torch.float64).flatten(), noise.double()])


def loader(workers: int, sampler: GlobalBatchSampler, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        SeededDataset(Augmented(), seed=5),
        batch_sampler=sampler,
        collate_fn=SeededCollator(noisy_collate),
        num_workers=workers,
        **options,
    )


def batches(workers: int = 0, **where: Any) -> list[torch.Tensor]:
    return list(loader(workers, GlobalBatchSampler(Permutation(N, 1), 4, **where)))


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the dataset --------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_epoch_and_index() -> None:
    dataset = SeededDataset(Augmented(), seed=5)
    sample = dataset[(2, 7)]
    draws()
    dataset[(3, 7)]
    assert dataset[(2, 7)] == sample
    assert dataset.__getitems__([(2, 4), (2, 7)])[1] == sample
    others = [
        dataset[(2, 8)][1:],
        dataset[(3, 7)][1:],
        SeededDataset(Augmented(), seed=6)[(2, 7)][1:],
    ]
    for other in others:
        assert not set(other) & set(sample[1:])


def test_sample_seed_is_the_documented_mix() -> None:
    dataset = SeededDataset(Augmented(), seed=5)
    for epoch, index in ((0, 0), (0, 9), (4, 9), (0, 9)):
        assert dataset.sample_seed(epoch, index) == mix(5, epoch, index)


def test_fetching_leaves_the_global_generators_alone_in_the_main_process() -> None:
    dataset = SeededDataset(Augmented(), seed=5)
    collate = SeededCollator(noisy_collate)
    before = states()
    dataset[(0, 1)]
    assert states() == before
    collate(dataset.__getitems__([(0, 1), (0, 2)]))
    assert states() == before


def test_switched_off_nothing_is_seeded_or_restored() -> None:
    dataset = SeededDataset(Augmented(), seed=5, enabled=False)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    samples = dataset.__getitems__([(0, 3), (0, 6)])
    after = states()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    assert samples == [Augmented()[3], Augmented()[6]]
    assert states() == after
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    assert SeededCollator(lambda _: torch.rand(()), enabled=False)(samples) == expected
    assert dataset[(0, 0)][0] == 0


def test_a_dataset_that_draws_nothing_is_not_seeded_for_its_collators_sake() -> None:
    def drawn(enabled: bool) -> tuple[Any, float]:
        samples = SeededDataset(Augmented(), 5, enabled=enabled).__getitems__([(0, 3)])
        return samples, SeededCollator(lambda _: torch.rand(()).item())(samples)

    (first, of_first), (second, of_second) = drawn(False), drawn(False)
    assert first != second
    assert of_first == of_second == drawn(True)[1]


def test_tables_are_fetched_by_the_batch_unless_a_transform_may_draw() -> None:
    plain, custom = Table(None), Table("custom")
    keys = [(0, 3), (0, 1)]
    assert SeededDataset(plain, 5).__getitems__(keys) == [[3.0], [1.0]]
    expected = SeededDataset(Augmented(), 5).__getitems__(keys)
    assert SeededDataset(custom, 5).__getitems__(keys) == expected
    assert (plain.batches, custom.batches) == (1, 0)


def test_a_subset_is_seeded_sample_by_sample() -> None:
    subset = SeededDataset(Subset(Augmented(), [4, 9]), 5)  # type: ignore[arg-type]
    together = subset.__getitems__([(0, 0), (0, 1)])
    assert together == [subset[(0, 0)], subset[(0, 1)]]


class Stream(IterableDataset[list[float]]):
    def __iter__(self) -> Any:
        yield draws()


def test_length_and_refusal_of_iterable_datasets() -> None:
    assert len(SeededDataset(Augmented(), 5)) == N

    for dataset in (Stream(), iter([1])):
        with pytest.raises(
            TypeError, match=r"expected a map-style dataset .* got (Stream|list_it)"
        ):
            SeededDataset(dataset, 5)


def test_an_empty_share_collates_to_none() -> None:
    dataset = SeededDataset(Augmented(), 5)
    assert SeededCollator(noisy_collate)(dataset.__getitems__([])) is None


def test_collators_draw_anew_for_each_batch_and_epoch() -> None:
    dataset = SeededDataset([0] * 9, 5)
    collate = SeededCollator(lambda _: tuple(draws()))
    keys = [[(0, 1)], [(0, 2)], [(1, 1)]]
    drawn = [collate(dataset.__getitems__(batch)) for batch in keys]
    assert len(set(drawn)) == 3
    assert drawn == [collate(dataset.__getitems__(batch)) for batch in keys]


class Placed:
    """A positioned collator that returns what it was told."""

    def set_position(self, seed: int, position: int) -> None:
        self.place = seed, position

    def __call__(self, features: list[Any]) -> tuple[int, int]:
        return self.place


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: FilteringCollator(c, [])])
def test_a_positioned_collator_is_told_seed_and_position(wrap: Any) -> None:
    """The position is that of the batch's first sample, counted over epochs and ranks."""
    dataset, collate = SeededDataset([0] * N, 5, enabled=False), SeededCollator(wrap(Placed()))
    for rank in range(2):
        sampler = GlobalBatchSampler(Permutation(N, 1), 4, 2, rank, epoch=1, start_batch=1)
        places = [collate(dataset.__getitems__(keys)) for keys in sampler if keys]
        expected = [N + 8 + 4 * rank, N + 16 + 4 * rank]
        assert places == [(5, position) for position in expected]


def test_samples_without_a_position_have_one_of_their_own() -> None:
    dataset, collate = SeededDataset([0] * N, 5), SeededCollator(Placed())
    places = [collate(dataset.__getitems__([(0, i)])) for i in range(N)]
    assert len(set(places)) == N
    assert all(seed == 5 and 0 <= position < 2**63 for seed, position in places)


def test_the_collator_gets_a_plain_list() -> None:
    samples = SeededDataset(Augmented(), 5).__getitems__([(0, 1)])
    assert type(SeededCollator(lambda samples: samples)(samples)) is list


# --- through a loader ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_random_data_and_collator_give_the_same_bits_with_any_workers(
    workers: int, prefetch: int
) -> None:
    sampler = GlobalBatchSampler(Permutation(N, 1), 4)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        draws()
        assert same(
            list(loader(workers, sampler, prefetch_factor=prefetch)),
            batches(0, epoch=epoch),
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_mid_epoch_gives_the_same_bits(workers: int) -> None:
    assert same(batches(workers, epoch=1, start_batch=2), batches(0, epoch=1)[2:])


def test_any_number_of_ranks_gives_the_same_bits() -> None:
    alone = batches(0)
    for ranks in (2, 3):
        shares = [batches(0, num_replicas=ranks, rank=rank) for rank in range(ranks)]
        dealt = [batch for turn in zip(*shares, strict=True) for batch in turn]
        assert same([batch for batch in dealt if batch is not None], alone)


def test_everything_survives_pickling() -> None:
    dataset = pickle.loads(pickle.dumps(SeededDataset([10, 11], 5)))
    assert dataset[(0, 1)] == 11
    assert pickle.loads(pickle.dumps(SeededCollator(len)))([1, 2]) == 2
    samples = pickle.loads(pickle.dumps(dataset.__getitems__([(0, 1)])))
    assert samples == [11]
    assert samples.place == dataset.__getitems__([(0, 1)]).place
    keys = next(iter(GlobalBatchSampler(Permutation(N, 1), 4, start_batch=2)))
    assert pickle.loads(pickle.dumps(keys)).position == keys.position == 8
