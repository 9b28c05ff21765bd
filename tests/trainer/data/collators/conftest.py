"""A tiny tokenizer built offline, the peer's collators, and a comparison that forgives nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far", ",", ".", "##s", "##ly"]


@pytest.fixture(scope="session")
def hf() -> ModuleType:
    """transformers, the peer."""
    return pytest.importorskip("transformers")


@pytest.fixture
def make_tokenizer(hf: ModuleType) -> Callable[..., Any]:
    """Builds a fast word-level tokenizer of 18 tokens; options go to its constructor."""
    tokenizers = pytest.importorskip("tokenizers")

    def make(*, without: tuple[str, ...] = (), **options: Any) -> Any:
        vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"])
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        special = {key: value for key, value in SPECIAL.items() if key not in without}
        return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)

    return make


@pytest.fixture(params=["right", "left"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Any:
    """The tiny tokenizer, padding on each side."""
    return make_tokenizer(padding_side=request.param)


@pytest.fixture
def sentences() -> list[str]:
    return ["the cat sat on the mat .", "a dog ran", "the dog , the cat ran far ."]


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Asserts equal keys, types, dtypes, shapes and bits of two batches."""

    def check(ours: Any, theirs: Any) -> None:
        assert set(ours) == set(theirs)
        for key, expected in theirs.items():
            got = ours[key]
            assert type(got) is type(expected), key
            if isinstance(expected, torch.Tensor):
                assert got.dtype == expected.dtype, key
                assert torch.equal(got, expected), key
            elif isinstance(expected, np.ndarray):
                assert got.dtype == expected.dtype, key
                np.testing.assert_array_equal(got, expected, err_msg=key, strict=True)
            else:
                assert got == expected, key

    return check
