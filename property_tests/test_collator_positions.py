"""Random collators: the batch is a function of (seed, position, rows), whatever ran before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
)

torch.set_num_threads(1)


class Tokenizer:
    """No more than the collators ask of a tokenizer: 0 pads, 1 masks, 2 is special too."""

    pad_token, pad_token_id, mask_token, mask_token_id = "[PAD]", 0, "[MASK]", 1
    padding_side = "right"

    def __len__(self) -> int:
        return 50

    def get_special_tokens_mask(
        self, ids: list[int], already_has_special_tokens: bool
    ) -> list[int]:
        return [int(i < 3) for i in ids]


def masked(kind: str, seed: int | None) -> Any:
    return DataCollatorForLanguageModeling(
        Tokenizer(), mlm_probability=0.5, return_tensors=kind, seed=seed
    )


def permuted(kind: str, seed: int | None) -> Any:
    return DataCollatorForPermutationLanguageModeling(
        Tokenizer(), plm_probability=0.5, return_tensors=kind
    )


integers = st.integers(-(2**63), 2**64 - 1)
steps = st.lists(st.tuples(integers, integers), max_size=3)
tokens = st.lists(st.integers(0, 49), min_size=8, max_size=8)
batches = st.lists(tokens, min_size=1, max_size=3)
collators = st.sampled_from([masked, permuted])


def global_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def bits(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(value).tolist() for key, value in batch.items()}


@given(
    collators,
    st.sampled_from(["pt", "np"]),
    st.none() | st.integers(0, 9),
    integers,
    integers,
    batches,
    steps,
    batches,
    st.integers(0, 2**32 - 1),
)
def test_same_place_same_bits(make, kind, own, seed, position, rows, history, other, noise):
    """A fresh collator, and one with a past and a moved world, give the same batch."""
    fresh = make(kind, own)
    fresh.set_position(seed, position)
    expected = bits(fresh(rows))

    used = make(kind, own)
    for place in history:
        used.set_position(*place)
        used(other)
    torch.manual_seed(noise)
    random.seed(noise)
    np.random.seed(noise)  # noqa: NPY002
    used.set_position(seed, position)
    before = global_states()
    assert bits(used(rows)) == expected
    assert global_states() == before


@given(integers, st.integers(0, 2**32), st.integers(0, 2**32))
def test_other_places_other_draws(seed, a, b):
    """Two places share a stream with probability 2**-32 only; 400 coins tell streams apart."""
    rows = [[7] * 400]
    collator = masked("pt", None)
    collator.set_position(seed, a)
    first = bits(collator(rows))
    collator.set_position(seed, b)
    assert (bits(collator(rows)) == first) == (a == b)


@pytest.mark.parametrize("make", [masked, permuted])
def test_frameworks_draw_alike(make):
    rows = [[7, 8, 9, 10] * 4]
    results = []
    for kind in ("pt", "np"):
        collator = make(kind, None)
        collator.set_position(1, 2)
        results.append(bits(collator(rows)))
    assert results[0] == results[1]
