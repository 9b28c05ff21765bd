"""Sample lengths: where they are read from, that reading is lazy and ends, and the errors."""

from __future__ import annotations

import random
from collections import UserDict
from typing import Any

import pytest

from trainer.data.lengths import sample_lengths

TOKENS = [[1] * n for n in (3, 0, 7, 2)]
LENGTHS = [3, 0, 7, 2]


class Columns:
    """What is used of a ``datasets.Dataset``; it counts the columns that were decoded."""

    def __init__(self, columns: dict[str, list[Any]], format_type: str | None = None) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.format = {"type": format_type}
        self.decoded: set[str] = set()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def select_columns(self, names: list[str]) -> Columns:
        return self._like({name: self.columns[name] for name in names}, self.format["type"])

    def with_format(self, type: str | None) -> Columns:
        return self._like(self.columns, type)

    def _like(self, columns: dict[str, list[Any]], format_type: str | None) -> Columns:
        other = Columns(columns, format_type)
        other.decoded = self.decoded
        return other

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            self.decoded.add(key)
            return self.columns[key]
        self.decoded.update(self.columns)
        row = {name: values[key] for name, values in self.columns.items()}
        if self.format["type"] == "custom":
            return {"input_ids": row["text"]}
        return row


class Endless:
    """A map-style dataset that answers at every index, and records what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.asked.append(index)
        assert index < 1000, "the legacy iteration protocol was used"
        return {"input_ids": TOKENS[index % 4]}


@pytest.mark.row(197)
def test_the_end_comes_from_len_and_not_from_an_index_error() -> None:
    dataset = Endless()
    assert sample_lengths(dataset) == LENGTHS
    assert dataset.asked == [0, 1, 2, 3]


@pytest.mark.row(197)
def test_upstream_does_not_stop_at_len() -> None:
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    with pytest.raises(AssertionError, match="legacy iteration protocol"):
        utils.LengthGroupedSampler(2, dataset=Endless())


@pytest.mark.row(52)
def test_the_length_column_is_read_and_nothing_else() -> None:
    data = Columns({"image": [None] * 4, "input_ids": TOKENS, "length": [5, 6, 7, 8]})
    assert sample_lengths(data) == [5, 6, 7, 8]
    assert data.decoded == {"length"}
    data = Columns({"n": [9, 8, 7, 6], "length": [5, 6, 7, 8]})
    assert sample_lengths(data, length_column="n") == [9, 8, 7, 6]


@pytest.mark.row(52)
def test_without_a_length_column_only_the_model_input_is_decoded() -> None:
    data = Columns({"image": [None] * 4, "input_ids": TOKENS})
    assert sample_lengths(data) == LENGTHS
    assert data.decoded == {"input_ids"}


def test_a_column_longer_than_a_chunk_is_read_whole() -> None:
    data = Columns({"length": list(range(2345))})
    assert sample_lengths(data) == list(range(2345))


def test_columns_without_select_columns() -> None:
    class Table:
        column_names = ("length",)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, key: str) -> list[int]:
            return {"length": [4, 5]}[key]

    assert sample_lengths(Table()) == [4, 5]


def test_a_transform_makes_the_samples_unless_there_is_a_length_column() -> None:
    data = Columns({"text": ["abc", "", "de"], "input_ids": [[], [], []]}, "custom")
    assert sample_lengths(data) == [3, 0, 2]
    data = Columns({"text": ["abc", ""], "length": [1, 2]}, "custom")
    assert sample_lengths(data) == [1, 2]


def test_lengths_of_another_model_input_and_of_mappings_that_are_not_dicts() -> None:
    data = [UserDict(pixel_values=row) for row in TOKENS]
    assert sample_lengths(data, input_name="pixel_values") == LENGTHS


def test_random_samples_leave_the_global_generators_alone() -> None:
    class Random(Endless):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return {"input_ids": [0] * random.randrange(9)}

    before = random.getstate()
    sample_lengths(Random())
    assert random.getstate() == before


def test_samples_that_are_no_mappings_or_lack_the_key() -> None:
    with pytest.raises(ValueError, match=r"key 'input_ids'; sample 0 is a tuple\. Add a column"):
        sample_lengths([(1, 2)])
    with pytest.raises(ValueError, match=r"sample 1 is a dict with the keys \['a', 'b'\]"):
        sample_lengths([{"input_ids": []}, {"b": 1, "a": 2}])


def test_an_input_without_a_length() -> None:
    with pytest.raises(ValueError, match=r"in 'input_ids' of sample 0, got int, which has no len"):
        sample_lengths([{"input_ids": 3}])
    with pytest.raises(ValueError, match=r"in 'input_ids' of sample 1, got float"):
        sample_lengths(Columns({"input_ids": [[1], 0.5]}))


def test_a_dataset_without_a_length() -> None:
    with pytest.raises(ValueError, match=r"a dataset with a length, got generator, whose len\(\)"):
        sample_lengths(i for i in range(3))
