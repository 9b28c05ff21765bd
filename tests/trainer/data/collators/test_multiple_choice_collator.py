"""The collator for multiple choice against upstream's."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from trainer.data.collators import DataCollatorForMultipleChoice

OPTIONS = [{}, {"padding": "max_length", "max_length": 12}, {"pad_to_multiple_of": 8}]


def rows_of(tokenizer, label="labels"):
    pairs = [("a dog ran", "the cat"), ("far .", "the cat sat on the mat .")]
    return [{**tokenizer(list(pair)), label: i} for i, pair in enumerate(pairs)]


@pytest.mark.row(56)
@pytest.mark.parametrize("label", ["label", "labels"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_upstream(hf, tokenizer, assert_same, options, label):
    rows = rows_of(tokenizer, label)
    ours = DataCollatorForMultipleChoice(tokenizer, **options)(rows)
    # Upstream takes the labels out of the rows that it is given.
    theirs = hf.DataCollatorForMultipleChoice(tokenizer, **options)(copy.deepcopy(rows))
    assert_same(ours, theirs)
    assert ours["input_ids"].shape[:2] == (2, 2)
    assert ours["labels"].tolist() == [0, 1]


def test_arrays_hold_the_same(tokenizer):
    rows = rows_of(tokenizer)
    tensors = DataCollatorForMultipleChoice(tokenizer)(rows)
    arrays = DataCollatorForMultipleChoice(tokenizer, return_tensors="np")(rows)
    assert set(arrays) == set(tensors)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[key].numpy(), strict=True)


def test_the_rows_keep_their_labels(tokenizer):
    rows = rows_of(tokenizer)
    DataCollatorForMultipleChoice(tokenizer)(rows)
    assert rows == rows_of(tokenizer)


def test_rows_to_predict_may_lack_labels(tokenizer):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows_of(tokenizer)]
    assert "labels" not in DataCollatorForMultipleChoice(tokenizer)(rows)


def test_unequal_numbers_of_choices_are_refused(tokenizer):
    rows = [{"input_ids": [[5], [6]], "labels": 0}, {"input_ids": [[5]], "labels": 0}]
    with pytest.raises(ValueError, match=r"row 1 has 1 choices in 'input_ids', row 0 has 2"):
        DataCollatorForMultipleChoice(tokenizer)(rows)


def test_an_empty_list_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"DataCollatorForMultipleChoice: the list of rows is empty"
    ):
        DataCollatorForMultipleChoice(tokenizer)([])
