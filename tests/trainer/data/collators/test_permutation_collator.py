"""The collator for permutation language modelling against upstream's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data.collators import DataCollatorForPermutationLanguageModeling

OPTIONS = [{}, {"plm_probability": 0.5, "max_span_length": 2}, {"plm_probability": 1}]


def rows_of(length=14, count=4):
    """Rows of unequal lengths, the longest even: [CLS], words, [SEP]."""
    return [[2, *range(5, 5 + length - 2 - n), 3] for n in range(count)]


@pytest.mark.row(56)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["lists", "mappings", "tensors"])
def test_from_the_default_generator_equal_to_upstream(hf, tokenizer, assert_same, options, form):
    rows = rows_of()
    if form == "mappings":
        rows = [{"input_ids": row} for row in rows]
    if form == "tensors":
        rows = [torch.tensor(row) for row in rows]
    ours = DataCollatorForPermutationLanguageModeling(tokenizer, **options)
    theirs = hf.DataCollatorForPermutationLanguageModeling(tokenizer, **options)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = theirs(rows)
        torch.manual_seed(seed)
        assert_same(ours(rows), expected)


def test_arrays_hold_what_the_tensors_hold(make_tokenizer):
    collator = DataCollatorForPermutationLanguageModeling(make_tokenizer())
    collator.set_position(1, 1)
    tensors = collator(rows_of())
    collator.set_position(1, 1)
    arrays = collator(rows_of(), return_tensors="np")
    assert set(arrays) == {"input_ids", "perm_mask", "target_mapping", "labels"}
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[key].numpy(), strict=True)


def test_no_token_sees_itself_chosen_and_none_is_special(make_tokenizer):
    collator = DataCollatorForPermutationLanguageModeling(make_tokenizer(), plm_probability=0.5)
    for position in range(10):
        collator.set_position(0, position)
        batch = collator(rows_of())
        chosen = batch["labels"] != -100
        assert (batch["labels"][chosen] >= 5).all()
        assert (batch["input_ids"][chosen] == 4).all()
        own = batch["perm_mask"].diagonal(dim1=1, dim2=2).bool()
        assert torch.equal(own, chosen)
        # Of two chosen tokens exactly one sees the other.
        hidden = batch["perm_mask"].bool()
        pairs = chosen[:, :, None] & chosen[:, None, :] & ~torch.eye(14).bool()
        assert torch.equal((hidden ^ hidden.transpose(1, 2)) & pairs, pairs)
        # Ordinary tokens that are not chosen see no chosen one.
        plain = ~chosen & (batch["input_ids"] >= 5)
        assert torch.equal(hidden[plain], chosen[:, None, :].expand(-1, 14, -1)[plain])


def test_a_tokenizer_without_a_pad_token_works_on_equal_rows(make_tokenizer):
    tokenizer = make_tokenizer(without=("pad_token",))
    batch = DataCollatorForPermutationLanguageModeling(tokenizer)([[2, 5, 6, 3], [2, 7, 8, 3]])
    assert batch["perm_mask"].shape == (2, 4, 4)


def test_the_rows_are_left_as_they_are(make_tokenizer):
    rows = [torch.tensor(row) for row in rows_of(count=1)]
    DataCollatorForPermutationLanguageModeling(make_tokenizer(), plm_probability=1)(rows)
    assert rows[0].tolist() == rows_of(count=1)[0]


def test_errors(make_tokenizer):
    tokenizer = make_tokenizer()
    where = "DataCollatorForPermutationLanguageModeling"
    with pytest.raises(
        ValueError, match=rf"{where}: rows must have an even number of tokens, got 3"
    ):
        DataCollatorForPermutationLanguageModeling(tokenizer)([[2, 5, 3]])
    with pytest.raises(ValueError, match=rf"{where}: .* does not have a mask token"):
        DataCollatorForPermutationLanguageModeling(make_tokenizer(without=("mask_token",)))
    with pytest.raises(ValueError, match=rf"{where}: plm_probability must be above 0 .* got 0"):
        DataCollatorForPermutationLanguageModeling(tokenizer, plm_probability=0)
    with pytest.raises(ValueError, match=rf"{where}: max_span_length must be at least 1, got 0"):
        DataCollatorForPermutationLanguageModeling(tokenizer, max_span_length=0)
    with pytest.raises(ValueError, match=rf"{where}: the list of rows is empty"):
        DataCollatorForPermutationLanguageModeling(tokenizer)([])
