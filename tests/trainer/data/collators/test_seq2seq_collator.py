"""The sequence-to-sequence collator against upstream's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data.collators import DataCollatorForSeq2Seq

OPTIONS = [
    {},
    {"pad_to_multiple_of": 8},
    {"padding": "longest", "label_pad_token_id": -1},
    {"padding": "max_length", "max_length": 11},
    {"padding": "max_length", "max_length": 11, "pad_to_multiple_of": 4},
    {"padding": "max_length", "max_length": 12, "return_tensors": "np"},
]


class Shifter:
    """Stands in for a model that derives the decoder's input by shifting the labels."""

    def prepare_decoder_input_ids_from_labels(self, labels):
        return torch.roll(labels, 1, dims=1)


def rows_of(tokenizer, sentences, convert=list, name="labels"):
    rows = [dict(tokenizer(text)) for text in sentences]
    return [{**row, name: convert(row["input_ids"][1:-1])} for row in rows]


@pytest.mark.row(56)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list:UserWarning")  # upstream does
@pytest.mark.parametrize("convert", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_upstream(hf, tokenizer, sentences, assert_same, options, convert):
    rows = rows_of(tokenizer, sentences, convert)
    ours = DataCollatorForSeq2Seq(tokenizer, **options)(rows)
    assert_same(ours, hf.DataCollatorForSeq2Seq(tokenizer, **options)(rows))


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list:UserWarning")
@pytest.mark.parametrize("convert", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize("padding", [False, "do_not_pad"])
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_without_padding_equal_to_upstream(hf, tokenizer, assert_same, convert, padding, kind):
    rows = rows_of(tokenizer, ["the cat", "a dog"], convert)
    ours = DataCollatorForSeq2Seq(tokenizer, padding=padding)(rows, return_tensors=kind)
    theirs = hf.DataCollatorForSeq2Seq(tokenizer, padding=padding)(rows, return_tensors=kind)
    assert_same(ours, theirs)


@pytest.mark.parametrize("strategy", ["LONGEST", "MAX_LENGTH", "DO_NOT_PAD"])
def test_the_strategy_enum_of_transformers_is_understood(hf, tokenizer, assert_same, strategy):
    from transformers.utils import PaddingStrategy

    options = {"padding": PaddingStrategy[strategy], "max_length": 9}
    rows = rows_of(tokenizer, ["the cat", "a dog"])
    ours = DataCollatorForSeq2Seq(tokenizer, **options)(rows)
    assert_same(ours, hf.DataCollatorForSeq2Seq(tokenizer, **options)(rows))


@pytest.mark.parametrize("name", ["label", "labels"])
def test_both_names_of_the_labels_become_labels(hf, tokenizer, sentences, assert_same, name):
    rows = rows_of(tokenizer, sentences, name=name)
    ours = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert_same(ours, hf.DataCollatorForSeq2Seq(tokenizer)(rows))
    assert "label" not in ours


@pytest.mark.parametrize("labels", [{}, {"labels": None}], ids=["absent", "None"])
def test_no_labels_give_none_as_upstream(hf, tokenizer, sentences, assert_same, labels):
    rows = [{**tokenizer(text), **labels} for text in sentences]
    ours = DataCollatorForSeq2Seq(tokenizer, model=Shifter())(rows)
    assert_same(ours, hf.DataCollatorForSeq2Seq(tokenizer, model=Shifter())(rows))
    assert ours["labels"] is None
    assert "decoder_input_ids" not in ours


def test_decoder_input_ids_come_from_the_model(hf, tokenizer, sentences, assert_same):
    rows = rows_of(tokenizer, sentences)
    ours = DataCollatorForSeq2Seq(tokenizer, model=Shifter())(rows)
    assert_same(ours, hf.DataCollatorForSeq2Seq(tokenizer, model=Shifter())(rows))
    assert torch.equal(ours["decoder_input_ids"], torch.roll(ours["labels"], 1, dims=1))
    assert "decoder_input_ids" not in DataCollatorForSeq2Seq(tokenizer, model=object())(rows)


def test_labels_longer_than_max_length_are_not_cut(make_tokenizer):
    collator = DataCollatorForSeq2Seq(make_tokenizer(), padding="max_length", max_length=2)
    rows = [{"input_ids": [5], "labels": [1, 2, 3]}, {"input_ids": [5], "labels": [1]}]
    assert collator(rows)["labels"].tolist() == [[1, 2, 3], [1, -100, -100]]


def test_the_rows_are_left_as_they_are(tokenizer, sentences):
    rows = rows_of(tokenizer, sentences)
    DataCollatorForSeq2Seq(tokenizer)(rows)
    assert rows == rows_of(tokenizer, sentences)


def test_errors(tokenizer):
    collator = DataCollatorForSeq2Seq(tokenizer)
    where = "DataCollatorForSeq2Seq"
    with pytest.raises(ValueError, match=rf"{where}: row 1 has no labels \(None\) while others"):
        collator([{"input_ids": [5], "labels": [1]}, {"input_ids": [5], "labels": None}])
    with pytest.raises(ValueError, match=rf"{where}: row 1 lacks the key 'labels'"):
        collator([{"input_ids": [5], "labels": [1]}, {"input_ids": [5]}])
    with pytest.raises(ValueError, match=rf"{where}: labels of 1 to 2 tokens .* without padding"):
        DataCollatorForSeq2Seq(tokenizer, padding=False)(
            [{"input_ids": [5], "labels": [1]}, {"input_ids": [5], "labels": [1, 2]}]
        )
    with pytest.raises(ValueError, match=rf"{where}: the list of rows is empty"):
        collator([])
    with pytest.raises(
        TypeError, match=rf"{where}: tokenizer must have the method pad, got NoneType"
    ):
        DataCollatorForSeq2Seq(None)
