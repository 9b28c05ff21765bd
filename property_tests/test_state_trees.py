"""Digests, differences and serialisation of arbitrary states; keys."""

import json
import random
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import trainstep as ts
from trainstep.compare import ulp_distance

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = st.text("ab.", min_size=1, max_size=3)
BITS = st.integers(0, 2**64 - 1)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any dtype, with any bits: NaNs, infinities and subnormals among them."""
    dtype = draw(st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool]))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=gen).bool()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    info = torch.iinfo(integers)
    return torch.randint(info.min, info.max, shape, generator=gen, dtype=integers).view(dtype)


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.floats())
TREES = st.recursive(
    st.one_of(tensors(), NUMBERS),
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=8,
)
STATES = st.builds(
    ts.TrainState,
    step=st.integers(0, 2**40),
    params=st.dictionaries(NAMES, tensors(), max_size=3),
    buffers=st.dictionaries(NAMES, tensors(), max_size=2),
    opt_state=TREES,
    key=st.builds(ts.rng.Key, BITS),
    extras=st.dictionaries(NAMES, TREES, max_size=2),
)


def shuffled(value: Any, rng: random.Random) -> Any:
    """Return the same tree with dicts filled in another order and tensors copied."""
    if isinstance(value, dict):
        items = [(k, shuffled(v, rng)) for k, v in value.items()]
        rng.shuffle(items)
        return dict(items)
    if isinstance(value, list | tuple):
        return type(value)(shuffled(v, rng) for v in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


@given(state=STATES, seed=st.integers(0, 99))
def test_digest_and_diff_ignore_insertion_order(state: ts.TrainState, seed: int) -> None:
    parts = ("params", "buffers", "opt_state", "extras")
    rng = random.Random(seed)
    other = state.evolve(**{part: shuffled(getattr(state, part), rng) for part in parts})
    assert ts.digest(other) == ts.digest(state)


@given(one=TREES, two=TREES)
def test_digests_agree_exactly_where_diff_is_empty(one: Any, two: Any) -> None:
    numbers = [leaf for tree in (one, two) for leaf in ts.tree.leaves(tree)]
    if not any(isinstance(x, float) and x != x for x in numbers):  # a float NaN is not itself
        assert ts.equal(one, two) == (ts.digest(one) == ts.digest(two))
        assert ts.equal(one, one)


@given(state=STATES, data=st.data())
def test_a_changed_bit_changes_the_digest_and_is_found(
    state: ts.TrainState, data: st.DataObject
) -> None:
    leaves, spec = ts.tree.flatten(state)
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.numel()]
    if not places:
        return
    at = data.draw(st.sampled_from(places))
    changed = leaves[at].clone().reshape(-1)
    kind = torch.bool if changed.dtype == torch.bool else torch.uint8
    bits = changed.view(kind)
    bits[0] = ~bits[0] if kind == torch.bool else bits[0] ^ 1
    copy = [*leaves]
    copy[at] = changed.reshape(leaves[at].shape)
    other = ts.tree.unflatten(copy, spec)
    assert ts.digest(other) != ts.digest(state)
    paths = [path for path, _ in ts.tree.leaves_with_paths(state)]
    assert paths[at] in [d.path for d in ts.diff(state, other)]


@given(state=STATES)
def test_serialisation_is_lossless(state: ts.TrainState) -> None:
    flat, metadata = ts.serialize.to_flat(state)
    again = ts.serialize.from_flat(flat, json.loads(json.dumps(metadata)))
    assert ts.digest(again) == ts.digest(state)
    # The order of insertion as well: optimizers walk over parameters in it.
    assert repr(again) == repr(state)


@given(dtype=st.sampled_from(FLOATS), start=st.floats(-4, 4, width=16), steps=st.integers(0, 40))
def test_ulps_are_steps_to_the_next_number(dtype: torch.dtype, start: float, steps: int) -> None:
    first = torch.tensor([start], dtype=dtype)
    last = first.clone()
    for _ in range(steps):
        last = torch.nextafter(last, torch.tensor([float("inf")], dtype=dtype))
    assert ulp_distance(first, last).item() == ulp_distance(last, first).item() == steps


@given(bits=BITS, data=st.lists(st.integers(-(2**65), 2**65), max_size=4))
def test_keys_fold_one_by_one_and_stay_in_range(bits: int, data: list[int]) -> None:
    key = ts.rng.Key(bits)
    one_by_one = key
    for value in data:
        one_by_one = one_by_one.fold_in(value)
    assert key.fold_in(*data) == one_by_one
    assert 0 <= one_by_one.bits < 2**64


@given(bits=BITS, values=st.sets(st.integers(0, 2**64 - 1), min_size=2, max_size=20))
def test_values_folded_into_one_key_never_collide(bits: int, values: set[int]) -> None:
    assert len({ts.rng.Key(bits).fold_in(value) for value in values}) == len(values)
