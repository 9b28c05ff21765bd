"""The collator for token classification against upstream's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data.collators import DataCollatorForTokenClassification

OPTIONS = [
    {},
    {"padding": "max_length", "max_length": 12},
    {"pad_to_multiple_of": 8, "label_pad_token_id": -1},
]
AS = {"list": list, "tuple": tuple, "array": np.array, "tensor": torch.tensor}


def rows_of(tokenizer, sentences, convert=list):
    rows = [dict(tokenizer(text)) for text in sentences]
    return [{**row, "labels": convert([i % 3 for i in row["input_ids"]])} for row in rows]


@pytest.mark.row(56)
@pytest.mark.parametrize("convert", AS.values(), ids=AS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tensors_equal_to_upstream(hf, tokenizer, sentences, assert_same, options, convert):
    rows = rows_of(tokenizer, sentences, convert)
    ours = DataCollatorForTokenClassification(tokenizer, **options)(rows)
    assert_same(ours, hf.DataCollatorForTokenClassification(tokenizer, **options)(rows))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_arrays_equal_to_upstream(hf, tokenizer, sentences, assert_same, options):
    rows = rows_of(tokenizer, sentences)
    ours = DataCollatorForTokenClassification(tokenizer, return_tensors="np", **options)(rows)
    theirs = hf.DataCollatorForTokenClassification(tokenizer, return_tensors="np", **options)
    assert_same(ours, theirs(rows))


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_without_labels_equal_to_upstream(hf, tokenizer, sentences, assert_same, kind):
    rows = [tokenizer(text) for text in sentences]
    ours = DataCollatorForTokenClassification(tokenizer)(rows, return_tensors=kind)
    theirs = hf.DataCollatorForTokenClassification(tokenizer)(rows, return_tensors=kind)
    assert_same(ours, theirs)


def test_the_key_label_stays_as_upstream_keeps_it(hf, tokenizer, sentences, assert_same):
    rows = [
        {k.replace("labels", "label"): v for k, v in row.items()}
        for row in rows_of(tokenizer, sentences)
    ]
    ours = DataCollatorForTokenClassification(tokenizer)(rows)
    assert_same(ours, hf.DataCollatorForTokenClassification(tokenizer)(rows))
    assert "label" in ours


def test_padding_is_on_the_tokenizers_side(make_tokenizer):
    rows = [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [5], "labels": [3]}]
    right = DataCollatorForTokenClassification(make_tokenizer(padding_side="right"))(rows)
    left = DataCollatorForTokenClassification(make_tokenizer(padding_side="left"))(rows)
    assert right["labels"].tolist() == [[1, 2], [3, -100]]
    assert left["labels"].tolist() == [[1, 2], [-100, 3]]


def test_the_rows_are_left_as_they_are(tokenizer, sentences):
    rows, again = rows_of(tokenizer, sentences), rows_of(tokenizer, sentences)
    DataCollatorForTokenClassification(tokenizer)(rows)
    assert rows == again


def test_errors(tokenizer):
    collator = DataCollatorForTokenClassification(tokenizer)
    where = "DataCollatorForTokenClassification"
    with pytest.raises(ValueError, match=rf"{where}: row 1 has 3 labels .* length of 2 tokens"):
        collator([{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [5], "labels": [1, 2, 3]}])
    with pytest.raises(ValueError, match=rf"{where}: row 1 lacks the key 'labels'"):
        collator([{"input_ids": [5], "labels": [1]}, {"input_ids": [5]}])
    with pytest.raises(TypeError, match=rf"{where}: row 0 is a list; expected a mapping"):
        collator([[1, 2]])
    with pytest.raises(TypeError, match=rf"{where}: tokenizer must have the method pad, got str"):
        DataCollatorForTokenClassification("bert-base-cased")
    with pytest.raises(ValueError, match=r"must be one of 'pt', 'np', got 'tf'"):
        DataCollatorForTokenClassification(tokenizer, return_tensors="tf")
