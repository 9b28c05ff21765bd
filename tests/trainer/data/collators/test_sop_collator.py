"""The collator for sentence order prediction."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from trainer.data.collators import DataCollatorForSOP


def make(collator_class, tokenizer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return collator_class(tokenizer, **options)


def rows_of(convert=torch.tensor):
    return [
        {
            "input_ids": convert([2, 5, 6, 3, 7, 8, 9, 3]),
            "token_type_ids": convert([0, 0, 0, 0, 1, 1, 1, 1]),
            "sentence_order_label": torch.tensor(0),
        },
        {
            "input_ids": convert([2, 5, 3, 7, 3]),
            "token_type_ids": convert([0, 0, 0, 1, 1]),
            "sentence_order_label": torch.tensor(1),
        },
    ]


@pytest.mark.row(56)
def test_equal_to_upstream_where_upstream_can_be_made_to_run(hf, make_tokenizer, assert_same):
    """Upstream forgets its tokenizer, which is put back by hand, and inverts the attention mask."""
    tokenizer = make_tokenizer()
    theirs = make(hf.DataCollatorForSOP, tokenizer)
    with pytest.raises(AttributeError):
        theirs(rows_of())
    theirs.tokenizer, theirs.mlm_probability = tokenizer, 0.5
    torch.manual_seed(4)
    expected = theirs(rows_of())
    torch.manual_seed(4)
    got = make(DataCollatorForSOP, tokenizer, mlm_probability=0.5)(rows_of())
    expected.pop("attention_mask")
    assert got.pop("attention_mask").tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert_same(got, expected)


def test_padding_is_on_the_tokenizers_side_for_every_key(make_tokenizer):
    collator = make(DataCollatorForSOP, make_tokenizer(padding_side="left"), mlm_probability=0.0)
    batch = collator(rows_of(list))
    assert batch["input_ids"][1].tolist() == [0, 0, 0, 2, 5, 3, 7, 3]
    assert batch["attention_mask"][1].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert (batch["labels"] == -100).all()
    assert batch["sentence_order_label"].tolist() == [0, 1]


def test_arrays_hold_what_the_tensors_hold(make_tokenizer):
    collator = make(DataCollatorForSOP, make_tokenizer(), mlm_probability=0.5)
    collator.set_position(0, 0)
    tensors = collator(rows_of())
    collator.set_position(0, 0)
    for key, array in collator(rows_of(), return_tensors="np").items():
        np.testing.assert_array_equal(array, tensors[key].numpy(), strict=True)


def test_it_says_that_it_is_deprecated(make_tokenizer):
    with pytest.warns(FutureWarning, match="DataCollatorForSOP is deprecated"):
        DataCollatorForSOP(make_tokenizer())


def test_errors(make_tokenizer):
    collator = make(DataCollatorForSOP, make_tokenizer())
    where = "DataCollatorForSOP"
    with pytest.raises(ValueError, match=rf"{where}: row 0 lacks the key 'token_type_ids'"):
        collator([{"input_ids": [5]}])
    with pytest.raises(ValueError, match=rf"{where}: the list of rows is empty"):
        collator([])
    with pytest.raises(ValueError, match=rf"{where}: .* does not have a mask token"):
        make(DataCollatorForSOP, make_tokenizer(without=("mask_token",)))
