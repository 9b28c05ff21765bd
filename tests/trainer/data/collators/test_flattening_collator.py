"""The padding-free collator against upstream's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trainer.data.collators import DataCollatorWithFlattening

FLAGS = ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")
ROWS = [
    {"input_ids": [10, 11, 12], "attention_mask": [1, 1, 1]},
    {"input_ids": [20, 21], "attention_mask": [1, 1]},
    {"input_ids": [30], "attention_mask": [1]},
]
LABELLED = [{**row, "labels": [-i for i in row["input_ids"]]} for row in ROWS]


@pytest.mark.row(56)
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("rows", [ROWS, LABELLED], ids=["inputs", "labels"])
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_equal_to_upstream(hf, assert_same, flags, rows, kind):
    options = dict(zip(FLAGS, flags, strict=True))
    ours = DataCollatorWithFlattening(return_tensors=kind, **options)(rows)
    assert_same(ours, hf.DataCollatorWithFlattening(return_tensors=kind, **options)(rows))


@pytest.mark.parametrize("convert", [np.array, torch.tensor], ids=["array", "tensor"])
def test_arrays_and_tensors_as_rows(hf, assert_same, convert):
    rows = [{k: convert(v) for k, v in row.items()} for row in LABELLED]
    ours = DataCollatorWithFlattening()(rows)
    assert_same(ours, hf.DataCollatorWithFlattening()(rows))


def test_separator_and_framework_of_the_call(hf, assert_same):
    ours = DataCollatorWithFlattening(separator_id=7)
    theirs = hf.DataCollatorWithFlattening(separator_id=7)
    assert_same(ours(ROWS), theirs(ROWS))
    assert ours(ROWS)["labels"].tolist() == [[7, 11, 12, 7, 21, 7]]
    assert_same(ours(ROWS, "np", -1), theirs(ROWS, "np", -1))


def test_an_empty_row_has_no_label():
    batch = DataCollatorWithFlattening()([{"input_ids": [1, 2]}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert batch["labels"].tolist() == [[-100, 2]]


def test_the_rows_are_left_as_they_are():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    DataCollatorWithFlattening()(rows)
    assert rows == [{"input_ids": [1, 2], "labels": [1, 2]}]


def test_errors():
    collator = DataCollatorWithFlattening()
    where = "DataCollatorWithFlattening"
    with pytest.raises(ValueError, match=rf"{where}: row 0 has 2 input_ids and 1 labels"):
        collator([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match=rf"{where}: row 1 lacks the key 'labels'"):
        collator([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match=rf"{where}: row 0 lacks the key 'input_ids'"):
        collator([{"labels": [1]}])
    with pytest.raises(TypeError, match=rf"{where}: row 0 is a list"):
        collator([[1, 2]])
    with pytest.raises(ValueError, match=rf"{where}: return_tensors must be .* got 'tf'"):
        collator(ROWS, return_tensors="tf")
    with pytest.raises(ValueError, match=rf"{where}: the list of rows is empty"):
        collator([])
