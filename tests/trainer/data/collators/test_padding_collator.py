"""The padding collator against upstream's."""

from __future__ import annotations

import logging

import pytest

from trainer.data.collators import DataCollatorWithPadding

OPTIONS = [
    {},
    {"padding": "max_length", "max_length": 12},
    {"pad_to_multiple_of": 8},
    {"return_tensors": "np"},
    {"padding": False, "return_tensors": None},
]


@pytest.mark.row(56)
@pytest.mark.parametrize("label", [None, "label", "label_ids", "labels"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_upstream(hf, tokenizer, sentences, assert_same, options, label):
    rows = [dict(tokenizer(text)) for text in sentences]
    if label is not None:
        rows = [{**row, label: i} for i, row in enumerate(rows)]
    ours = DataCollatorWithPadding(tokenizer, **options)(rows)
    theirs = hf.DataCollatorWithPadding(tokenizer, **options)(rows)
    assert_same(ours, theirs)
    assert ("labels" in ours) == (label is not None)


def test_a_mapping_of_columns_is_padded_too(hf, tokenizer, sentences, assert_same):
    columns = tokenizer(sentences)
    ours = DataCollatorWithPadding(tokenizer)(columns)
    assert_same(ours, hf.DataCollatorWithPadding(tokenizer)(columns))


def test_the_strategy_enum_of_transformers_is_understood(hf, tokenizer, sentences, assert_same):
    from transformers.utils import PaddingStrategy

    rows = [tokenizer(text) for text in sentences]
    options = {"padding": PaddingStrategy.MAX_LENGTH, "max_length": 11}
    ours = DataCollatorWithPadding(tokenizer, **options)(rows)
    assert_same(ours, hf.DataCollatorWithPadding(tokenizer, **options)(rows))


def test_the_advice_of_fast_tokenizers_is_silenced_and_its_record_restored(
    tokenizer, sentences, caplog
):
    logging.getLogger("transformers").propagate = True
    tokenizer.deprecation_warnings.clear()
    rows = [tokenizer(text) for text in sentences]
    with caplog.at_level(logging.WARNING):
        DataCollatorWithPadding(tokenizer)(rows)
    assert not caplog.records
    assert not tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"]


def test_whatever_pads_will_do():
    class Extractor:
        def pad(self, features, **options):
            return {"input_values": [f["input_values"] for f in features], "options": options}

    batch = DataCollatorWithPadding(Extractor())([{"input_values": [1]}])
    assert batch["input_values"] == [[1]]
    assert batch["options"] == {
        "padding": True,
        "max_length": None,
        "pad_to_multiple_of": None,
        "return_tensors": "pt",
    }


def test_what_cannot_pad_is_refused_at_construction():
    with pytest.raises(
        TypeError,
        match=r"DataCollatorWithPadding: tokenizer must have the method pad, got NoneType",
    ):
        DataCollatorWithPadding(None)


def test_an_empty_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"DataCollatorWithPadding: the list of rows is empty"):
        DataCollatorWithPadding(tokenizer)([])
