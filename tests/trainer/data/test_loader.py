"""Loaders: which order, which seeds, and how they seek."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from support.shell import Stream, make_args, samples
from trainer.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)
from trainer.data.columns import FilteringCollator
from trainer.data.feed import batches_from
from trainer.data.grouped import LengthGrouped
from trainer.data.loader import is_deterministic, is_iterable, make_loader, train_order
from trainer.data.order import Feistel, Permutation, Sequential


class Noisy:
    """Samples that draw from the three global generators."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> list[float]:
        numpy_draw = float(np.random.rand())  # noqa: NPY002
        return [index, random.random(), numpy_draw, float(torch.rand(()))]


def noisy_collate(rows: list[Any]) -> list[Any]:
    return [*rows, float(torch.rand(()))]


def loader(folder: Path, dataset: Any = None, **changes: Any) -> Any:
    args = make_args(folder, **changes)
    dataset = Noisy() if dataset is None else dataset
    order = None if is_iterable(dataset) else train_order(args, dataset, args.train_batch_size)
    return make_loader(dataset, noisy_collate, args, batch_size=args.train_batch_size, order=order)


@pytest.mark.row(48)
def test_the_default_order_is_that_of_a_generator_seeded_with_seed_and_epoch(
    tmp_path: Path,
) -> None:
    for data_seed, seed in ((None, 7), (9, 9)):
        order = train_order(make_args(tmp_path, seed=7, data_seed=data_seed), range(10), 2)
        generator = torch.Generator().manual_seed(seed + 2)
        assert order == Permutation(10, seed)
        assert order.indices(2, 0, 10).tolist() == torch.randperm(10, generator=generator).tolist()


def test_other_orders(tmp_path: Path) -> None:
    args = make_args(tmp_path, train_sampling_strategy="sequential")
    assert train_order(args, range(10), 2) == Sequential(10)
    args = make_args(tmp_path, train_sampling_strategy="feistel", seed=3)
    assert train_order(args, range(10**9), 2) == Feistel(10**9, 3)

    rows = [{"tokens": [0] * n} for n in (1, 5, 3, 2)]
    args = make_args(
        tmp_path, train_sampling_strategy="group_by_length", gradient_accumulation_steps=2
    )

    class Processor:
        model_input_names = ("tokens",)

    order = train_order(args, rows, args.train_batch_size, Processor())
    assert isinstance(order, LengthGrouped)
    assert order.take(0, torch.arange(1)).tolist() == [1]  # the longest one comes first
    with pytest.raises(ValueError, match="input_ids"):
        train_order(args, rows, args.train_batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_epoch_and_position(workers: int, tmp_path: Path) -> None:
    whole = list(batches_from(loader(tmp_path), 3, 0))
    assert len(whole) == 5

    other = loader(tmp_path, dataloader_num_workers=workers)
    torch.manual_seed(99)
    random.seed(99)
    for skip in (4, 0, 2):
        assert list(batches_from(other, 3, skip)) == whole[skip:]
    assert list(batches_from(other, 4, 0)) != whole


def test_loading_leaves_the_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(batches_from(loader(tmp_path), 0, 1))

    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


@pytest.mark.row(58, 198)
@pytest.mark.parametrize(("drop", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_a_last_batch_that_is_not_full(drop: bool, sizes: list[int], tmp_path: Path) -> None:
    for dataset in (Noisy(), Stream(samples(10))):
        batches = loader(
            tmp_path, dataset, per_device_train_batch_size=4, dataloader_drop_last=drop
        )
        assert [len(batch) - 1 for batch in batches_from(batches, 0, 0)] == sizes


@pytest.mark.row(57)
def test_worker_settings_reach_the_loader(tmp_path: Path) -> None:
    made = loader(
        tmp_path,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
    )
    assert (made.num_workers, made.prefetch_factor, made.persistent_workers) == (2, 3, True)
    assert not made.pin_memory
    assert loader(tmp_path).num_workers == 0
    stream = loader(tmp_path, Stream(samples(4)), dataloader_num_workers=2)
    assert (stream.num_workers, len(stream.dataset.dataset.passes)) == (2, 1)


@pytest.mark.parametrize(("workers", "training", "pins"), [(0, 1, 0), (2, 1, 1), (0, 0, 1)])
def test_who_pins_batches(
    workers: int, training: bool, pins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_args(tmp_path, dataloader_num_workers=workers)
    args.dataloader_pin_memory = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = {"batch_size": 2, "order": Sequential(4), "training": training}
    made = make_loader(samples(4), default_data_collator, args, **options)
    assert made.pin_memory == pins


def test_datasets_that_bring_their_own_order() -> None:
    class NoLength:
        def __getitem__(self, index: int) -> int: ...

    assert [is_iterable(d) for d in ([1], Noisy(), Stream([1]), iter([1]), NoLength())] == [
        *[False, False],
        *[True, True, True],
    ]


class Declared:
    deterministic = True


class Tokenizer:
    """Enough of one to be accepted by collators."""

    mask_token, pad_token, pad_token_id = "[MASK]", "[PAD]", 0

    def pad(self, *args: Any, **kwargs: Any) -> None: ...

    def __len__(self) -> int:
        return 5


class Table:
    """Enough of a ``datasets.Dataset``."""

    column_names = ("a",)

    def __init__(self, kind: str | None) -> None:
        self.format = {"type": kind}


class StreamingTable(Table, IterableDataset):
    """Enough of a ``datasets.IterableDataset``."""

    def __iter__(self) -> Any: ...


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ([1], True),
        (TensorDataset(torch.zeros(2)), True),
        (Subset([1], [0]), True),  # type: ignore[arg-type]
        (Subset(Noisy(), [0]), False),  # type: ignore[arg-type]
        (Noisy(), False),
        (Declared(), True),
        (Table("torch"), True),
        (Table("custom"), False),
        (StreamingTable(None), False),  # it may run random functions on the way
        (Stream([1]), False),
        (default_data_collator, True),
        (DefaultDataCollator(), True),
        (DataCollatorWithPadding(Tokenizer()), True),
        (FilteringCollator(default_data_collator, []), True),
        (FilteringCollator(noisy_collate, []), False),
        (noisy_collate, False),
    ],
)
def test_what_is_known_to_draw_nothing(part: Any, expected: bool) -> None:
    assert is_deterministic(part) is expected


def test_a_concatenation_draws_if_a_part_does() -> None:
    assert is_deterministic(ConcatDataset([[1], [2]]))  # type: ignore[list-item]
    assert not is_deterministic(ConcatDataset([[1], Noisy()]))  # type: ignore[list-item]


def test_masking_collators_are_not_deterministic() -> None:
    assert not is_deterministic(DataCollatorForLanguageModeling(Tokenizer()))


def test_only_what_may_draw_is_seeded(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    for data, data_draw in (([1, 2], False), (Noisy(), True)):
        for collate, collate_draws in ((default_data_collator, False), (noisy_collate, True)):
            made = make_loader(data, collate, args, batch_size=2, order=Sequential(2))
            assert made.dataset.enabled is data_draw
            assert made.collate_fn.enabled is collate_draws
