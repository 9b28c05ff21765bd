"""The collators for language modelling: against upstream's, and by their own statistics.

With the same seed the draws are those of upstream, one by one, so that even the random batches are
compared bit for bit.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from trainer.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorForWholeWordMask,
)

MASK = 4
PROBABILITIES = [
    {},
    {"mlm_probability": 0.5},
    {"mlm_probability": 1, "mask_replace_prob": 0.3, "random_replace_prob": 0.5},
    {"mlm_probability": 0.6, "mask_replace_prob": 0, "random_replace_prob": 1},
    {"mlm_probability": 0.6, "mask_replace_prob": 1, "random_replace_prob": 0},
    {"mlm_probability": 0.6, "mask_replace_prob": 0.5, "random_replace_prob": 0},
    {"mlm_probability": 0.0, "pad_to_multiple_of": 8},
]


def rows_of(tokenizer, sentences, **options):
    return [dict(tokenizer(text, **options)) for text in sentences]


@pytest.mark.row(56)
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *itertools.product(["pt", "np"], ["mappings", "lists", "arrays"]),
        ("pt", "tensors"),  # which upstream does not take for arrays
    ],
)
def test_causal_equal_to_upstream(hf, tokenizer, sentences, assert_same, kind, multiple, form):
    rows = rows_of(tokenizer, sentences)
    convert = {"lists": list, "arrays": np.array, "tensors": torch.tensor}
    if form != "mappings":
        rows = [convert[form](row["input_ids"]) for row in rows]
    options = {"mlm": False, "pad_to_multiple_of": multiple, "return_tensors": kind}
    ours = DataCollatorForLanguageModeling(tokenizer, **options)(rows)
    assert_same(ours, hf.DataCollatorForLanguageModeling(tokenizer, **options)(rows))
    assert (ours["labels"] == -100).any()


@pytest.mark.row(56)
@pytest.mark.parametrize("options", PROBABILITIES, ids=str)
@pytest.mark.parametrize("special", [False, True], ids=["asked", "given"])
def test_masked_with_a_seed_equal_to_upstream(
    hf, tokenizer, sentences, assert_same, options, special
):
    rows = rows_of(tokenizer, sentences, return_special_tokens_mask=special)
    ours = DataCollatorForLanguageModeling(tokenizer, seed=3, **options)
    theirs = hf.DataCollatorForLanguageModeling(tokenizer, seed=3, **options)
    for _ in range(3):
        assert_same(ours(rows), theirs(rows))


def test_masked_from_the_default_generator_equal_to_upstream(hf, tokenizer, sentences, assert_same):
    rows = [tokenizer(text)["input_ids"] for text in sentences]
    torch.manual_seed(1)
    expected = hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)(rows)
    torch.manual_seed(1)
    assert_same(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)(rows), expected)


@pytest.mark.parametrize("options", [{"mlm": True}, {"whole_word_mask": True}], ids=str)
def test_arrays_hold_what_the_tensors_hold(make_tokenizer, sentences, options):
    tokenizer = make_tokenizer()
    rows = rows_of(tokenizer, sentences, return_offsets_mapping=True)
    options |= {"mlm_probability": 0.5, "mask_replace_prob": 1, "random_replace_prob": 0}
    collator = DataCollatorForLanguageModeling(tokenizer, **options)
    collator.set_position(0, 1)
    tensors = collator(rows)
    collator.set_position(0, 1)
    arrays = collator(rows, return_tensors="np")
    assert set(arrays) == set(tensors)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[key].numpy(), strict=True)


def test_special_tokens_are_never_chosen(tokenizer, sentences):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0)
    batch = collator(rows_of(tokenizer, [*sentences, "unknown words"]))
    # Ids below 5 are special; the labels hold all others, at their places.
    original = tokenizer.pad(rows_of(tokenizer, [*sentences, "unknown words"]), return_tensors="pt")
    ordinary = original["input_ids"] >= 5
    assert torch.equal(batch["labels"] != -100, ordinary)
    assert torch.equal(batch["labels"][ordinary], original["input_ids"][ordinary])
    assert torch.equal(batch["input_ids"][~ordinary], original["input_ids"][~ordinary])


def test_shares_of_the_chosen_tokens(make_tokenizer):
    """20000 tokens: each share lies within four standard deviations of its probability."""
    tokenizer = make_tokenizer()
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.3, mask_replace_prob=0.6, random_replace_prob=0.3, seed=0
    )
    ids = torch.full((100, 200), 7)
    batch = collator(list(ids))
    chosen = batch["labels"] != -100
    masked = (batch["input_ids"] == MASK) & chosen
    changed = (batch["input_ids"] != 7) & ~masked
    # A random token is [MASK] or the old one in 2 of 18 cases.
    random_share = 0.3 * 16 / 18
    assert abs(chosen.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 20000) ** 0.5
    count = int(chosen.sum())
    mask_share = 0.6 + 0.3 / 18
    assert (
        abs(masked.sum() / count - mask_share) < 4 * (mask_share * (1 - mask_share) / count) ** 0.5
    )
    limit = 4 * (random_share * (1 - random_share) / count) ** 0.5
    assert abs(changed.sum() / count - random_share) < limit
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])


def test_inputs_are_left_as_they_are(make_tokenizer):
    collator = DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=1.0)
    ids = torch.full((2, 4), 7)
    array = ids.numpy().copy()
    collator.torch_mask_tokens(ids)
    collator.numpy_mask_tokens(array)
    assert (ids == 7).all()
    assert (array == 7).all()


def test_a_mask_token_is_needed_only_when_masking(make_tokenizer):
    tokenizer = make_tokenizer(without=("mask_token",))
    with pytest.raises(
        ValueError,
        match=r"DataCollatorForLanguageModeling: .* does not have a mask token.*mlm=False",
    ):
        DataCollatorForLanguageModeling(tokenizer)
    DataCollatorForLanguageModeling(tokenizer, mlm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": None}, "mlm_probability should be between 0 and 1, got None"),
        ({"mlm_probability": 1.5}, "mlm_probability should be between 0 and 1, got 1.5"),
        ({"mlm_probability": float("nan")}, "mlm_probability should be between 0 and 1, got nan"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob should be between 0 and 1, got -0.1"),
        ({"random_replace_prob": 2}, "random_replace_prob should be between 0 and 1, got 2"),
        (
            {"mask_replace_prob": 0.8, "random_replace_prob": 0.3},
            r"\(0.8\).*\(0.3\) should not exc",
        ),
        (
            {"mlm": False, "whole_word_mask": True},
            "whole_word_mask=True masks, so it needs mlm=True",
        ),
        ({"return_tensors": "tf"}, "must be one of 'pt', 'np', got 'tf'"),
    ],
)
def test_bad_arguments(hf, make_tokenizer, options, message):
    with pytest.raises(ValueError, match=f"DataCollatorForLanguageModeling: .*{message}"):
        DataCollatorForLanguageModeling(make_tokenizer(), **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_without_a_pad_token_is_refused(make_tokenizer, side):
    tokenizer = make_tokenizer(without=("pad_token",), padding_side=side)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ValueError, match=r"rows of 1 to 2 tokens .* does not have a pad token"):
        collator([[5, 6], [5]])
    assert collator([[5, 6], [7, 8]])["labels"].tolist() == [[5, 6], [7, 8]]


def test_bad_rows(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(TypeError, match=r"row 1 must be a one-dimensional .* got str\. Tokenize"):
        collator([[5], "text"])
    with pytest.raises(TypeError, match=r"row 0 must be .* got list \(.*\)\. Tokenize"):
        collator([["text"]])
    with pytest.raises(TypeError, match=r"row 0 must be .* got Tensor"):
        collator([torch.ones(2, 2)])
    with pytest.raises(TypeError, match=r"row 1 is a list; expected a mapping"):
        collator([{"input_ids": [5]}, [5]])
    with pytest.raises(ValueError, match=r"the list of rows is empty"):
        collator([])


def test_a_dataclass_can_extend_it(make_tokenizer):
    @dataclass
    class Weighted(DataCollatorForLanguageModeling):
        weight: float = 2.0

        def torch_call(self, features):
            return {**super().torch_call(features), "weight": self.weight}

    collator = Weighted(make_tokenizer(), mlm=False, weight=3.0)
    assert collator([[5, 6]])["weight"] == 3.0


# Whole words


def whole_words(collator_class, tokenizer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collator_class(tokenizer, **options)


@pytest.mark.row(56)
@pytest.mark.parametrize("special", [False, True], ids=["asked", "given"])
def test_whole_words_with_a_seed_equal_to_upstream(hf, tokenizer, assert_same, special):
    texts = ["the cat,sat on.", "a dog ran.far,", "mat,mat a . the", "the 's on.,"]
    rows = rows_of(
        tokenizer, texts, return_offsets_mapping=True, return_special_tokens_mask=special
    )
    # Upstream does not pad offsets, so rows are compared that need no padding.
    assert {len(row["input_ids"]) for row in rows} == {8}
    options = {"whole_word_mask": True, "mlm_probability": 0.5, "seed": 2}
    ours = whole_words(DataCollatorForLanguageModeling, tokenizer, **options)
    theirs = whole_words(hf.DataCollatorForLanguageModeling, tokenizer, **options)
    for _ in range(4):
        assert_same(ours(rows), theirs(rows))
    options.pop("whole_word_mask")
    ours = whole_words(DataCollatorForWholeWordMask, tokenizer, **options)
    theirs = whole_words(hf.DataCollatorForWholeWordMask, tokenizer, **options)
    for _ in range(4):
        assert_same(ours(rows), theirs(rows))


def test_words_are_masked_whole_in_padded_batches(tokenizer):
    texts = ["the cat,sat on.", "a dog", "mat.", ",.,.,. far"]
    rows = rows_of(tokenizer, texts, return_offsets_mapping=True)
    collator = whole_words(
        DataCollatorForLanguageModeling, tokenizer, whole_word_mask=True, mlm_probability=0.5
    )
    groups = [[1, 2, 2, 2, 3, 3], [1, 2], [1, 1], [1, 1, 1, 1, 1, 1, 2]]
    seen = set()
    for position in range(20):
        collator.set_position(0, position)
        chosen = collator(rows)["labels"] != -100
        for row, text_row, words in zip(chosen, rows, groups, strict=True):
            length = len(text_row["input_ids"])
            inside = row[:length] if tokenizer.padding_side == "right" else row[-length:]
            assert not inside[0]  # [CLS]
            assert not inside[-1]  # [SEP]
            assert row.sum() == inside.sum()
            flags = inside[1:-1].tolist()
            by_word = {
                word: {f for f, w in zip(flags, words, strict=True) if w == word} for word in words
            }
            assert all(len(kinds) == 1 for kinds in by_word.values())
            seen |= {kind for kinds in by_word.values() for kind in kinds}
    assert seen == {False, True}


def test_offsets_are_ignored_unless_words_are_masked(tokenizer, sentences):
    rows = rows_of(tokenizer, sentences, return_offsets_mapping=True)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_whole_words_settle_the_shares_with_a_warning(make_tokenizer):
    with pytest.warns(
        UserWarning, match="mask_replace_prob is set to 1 and random_replace_prob to 0"
    ):
        collator = DataCollatorForLanguageModeling(make_tokenizer(), whole_word_mask=True)
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (1.0, 0.0)


def test_slow_tokenizers_are_warned_of():
    class Slow:
        mask_token, is_fast = "[MASK]", False

    with pytest.warns(UserWarning, match="only fast tokenizers make"):
        DataCollatorForLanguageModeling(
            Slow(), whole_word_mask=True, mask_replace_prob=1, random_replace_prob=0
        )


def test_whole_words_need_offsets(tokenizer, sentences):
    collator = whole_words(DataCollatorForLanguageModeling, tokenizer, whole_word_mask=True)
    with pytest.raises(
        ValueError, match=r"needs 'offset_mapping' in each row.*return_offsets_mapping"
    ):
        collator(rows_of(tokenizer, sentences))
    with pytest.raises(ValueError, match=r"needs 'offset_mapping' in each row"):
        collator([[5, 6]])


def test_the_deprecated_name_warns_and_forces_its_mode(make_tokenizer):
    with pytest.warns(FutureWarning, match="DataCollatorForWholeWordMask is deprecated"):
        collator = DataCollatorForWholeWordMask(make_tokenizer(), mlm=False)
    assert collator.mlm
    assert collator.whole_word_mask
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (0.8, 0.1)
