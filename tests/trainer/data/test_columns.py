"""Leaving out what the model does not take."""

import logging
import pickle
from typing import Any

import pytest

from trainer.data.columns import LABELS, FilteringCollator, keep_columns


class Table:
    """Enough of a ``datasets.Dataset``."""

    def __init__(self, *names: str) -> None:
        self.column_names = list(names)

    def remove_columns(self, names: list[str]) -> "Table":
        return Table(*(name for name in self.column_names if name not in names))


@pytest.mark.row(53)
def test_columns_that_are_not_used_are_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    table = Table("text", "input_ids", "label", "labels", "label_ids", "id")
    with caplog.at_level(logging.INFO, logger="trainer"):
        kept = keep_columns(table, ["input_ids", "mask", *LABELS], "training")

    assert kept.column_names == ["input_ids", "label", "labels", "label_ids"]
    assert "The training data's columns text, id are not used" in caplog.text
    assert keep_columns(kept, ["input_ids", *LABELS], "training") is kept


@pytest.mark.row(53)
def test_a_table_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"none of the test dataset's columns \(text, id\).*\(x, y\).*remove_unused_columns=False",
    ):
        keep_columns(Table("text", "id"), ["x", "y"], "test")


def test_other_datasets_pass_through() -> None:
    class Columnar:
        column_names = {"train": ["a"]}  # noqa: RUF012

    for dataset in ([{"a": 1}], Columnar()):
        assert keep_columns(dataset, ["x"], "training") is dataset


def collate(samples: list[Any]) -> list[Any]:
    return samples


def test_samples_that_are_dicts_lose_unused_keys() -> None:
    filtered = FilteringCollator(collate, ["x", *LABELS])

    assert filtered([{"x": 1, "id": 2, "labels": 3}]) == [{"x": 1, "labels": 3}]
    assert filtered([{"x": 1, "label": 2, "label_ids": 3}]) == [
        {"x": 1, "label": 2, "label_ids": 3}
    ]
    whole = [{"x": 1}]
    assert filtered(whole)[0] is whole[0]
    assert filtered([(1, 2)]) == [(1, 2)]
    assert filtered([]) == []
    again = pickle.loads(pickle.dumps(filtered))
    assert again([{"x": 1, "y": 2}]) == [{"x": 1}]


def test_keys_that_only_some_samples_have_are_dropped_too() -> None:
    filtered = FilteringCollator(collate, ["x", *LABELS])

    assert filtered([{"x": 1, "id": 0}, {"x": 2, "note": 1}]) == [{"x": 1}, {"x": 2}]
    assert filtered([{"x": 1}, 5, {"x": 2, "note": 1}]) == [{"x": 1}, 5, {"x": 2}]
