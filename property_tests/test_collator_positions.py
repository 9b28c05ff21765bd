"""Random collators: the batch is a function of (seed, position, rows), whatever ran before."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from support.shell import make_args
from trainer.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
)
from trainer.data.columns import FilteringCollator
from trainer.data.feed import Feed
from trainer.data.loader import make_loader
from trainer.data.order import Permutation

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


# ---- through loaders


ROWS = [[3 + (i + k) % 40 for k in range(8)] for i in range(14)]


class Streamed(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def feed(collate: Any, streamed: bool, seed: int = 0, rows: Any = ROWS, **changes: Any) -> Feed:
    args = make_args(Path("unused"), data_seed=seed, **changes)
    data, order = (Streamed(rows), None) if streamed else (rows, Permutation(len(rows), seed))
    collate = FilteringCollator(collate, ["input_ids"])
    return Feed(make_loader(data, collate, args, batch_size=3, order=order))


@pytest.mark.row(192)
@given(
    collators,
    st.none() | st.integers(0, 9),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.integers(0, 1),
    st.integers(0, 4),
)
@settings(max_examples=12)
def test_masks_do_not_depend_on_workers_prefetching_or_where_a_run_went_on(
    make, own, streamed, seed, workers, factor, epoch, done
):
    def batches(feed: Feed, epoch: int, skip: int = 0) -> list[Any]:
        return [bits(batch) for batch in feed(epoch, skip)]

    ours = feed(make("pt", own), streamed, seed)
    both = [batches(ours, 0), batches(ours, 1)]
    assert [masks(batch) for batch in both[0]] != [masks(batch) for batch in both[1]]

    others = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": factor}
    if streamed:
        first = feed(make("pt", own), streamed, seed, **others)
        list(islice(first(epoch, 0), done))
        state = first.state(epoch)
    else:
        state = None
    again = feed(make("pt", own), streamed, seed, **others)
    again.load(state)
    torch.manual_seed(done)
    assert batches(again, epoch, done) == both[epoch][done:]


def masks(batch: dict[str, Any]) -> Any:
    """What a batch's random draws decided."""
    return [[label != -100 for label in row] for row in batch["labels"]], batch.get("perm_mask")


@pytest.mark.parametrize("streamed", [False, True])
def test_every_batch_of_a_run_has_masks_of_its_own(streamed):
    """All rows are the same here, so that only the draws can differ."""
    rows = [[7] * 30] * 15
    runs = [feed(masked("pt", None), streamed, rows=rows) for _ in range(2)]
    drawn = [
        [masks(bits(batch)) for epoch in range(3) for batch in ours(epoch, 0)] for ours in runs
    ]
    assert len({str(one) for one in drawn[0]}) == len(drawn[0]) == 15
    assert drawn[0] == drawn[1]
