"""What holds for every optimizer, transformation and guard: purity, donation, resume, completeness."""

import inspect
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

import trainstep as ts
from strategies import GUARDS, OPTIMIZERS, SUBJECTS, TRANSFORMS, about, build
from support.snapshots import untouched

every_part = pytest.mark.parametrize("subject", SUBJECTS, ids="-".join)
few = settings(max_examples=max(3, settings().max_examples // 8))


def scramble_global_rngs(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (the global generator is the point)


def form(state: ts.TrainState) -> list[tuple[str, Any]]:
    """Return path, shape and dtype of every leaf: what must be there from the start."""
    return [
        (path, (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf))
        for path, leaf in ts.tree.leaves_with_paths(state)
    ]


@every_part
@few
@given(data=st.data())
def test_a_step_is_pure_and_deterministic_and_its_state_complete(
    subject: tuple[str, str], data: st.DataObject
) -> None:
    run = build(data.draw(about(subject)))
    state = run.state
    for batch in run.batches:
        with untouched(run.module, state, batch):
            after, metrics = run.step(state, batch)
        scramble_global_rngs(after.step)
        again, repeated = run.step(state, batch)
        assert ts.digest(after) == ts.digest(again)
        assert ts.equal(metrics, repeated)
        state = after
    assert form(state) == form(run.state), "a leaf came, went or changed its form"


@every_part
@few
@given(data=st.data())
def test_donation_has_the_same_bits_and_consumes(
    subject: tuple[str, str], data: st.DataObject
) -> None:
    setup = data.draw(about(subject))
    run, other = build(setup), build(setup)
    state, given_away = run.state, other.state
    for batch in run.batches:
        state, expected = run.step(state, batch)
        before = given_away
        given_away, metrics = ts.donate(other.step)(before, batch)
        assert ts.digest(given_away) == ts.digest(state)
        assert ts.equal(metrics, expected)
        with pytest.raises(RuntimeError, match=f"donated at step {state.step - 1}"):
            before.params  # noqa: B018
    # What a pure step returns shares nothing that moves: it may be donated, and the old state stays.
    after, _ = run.step(run.state, run.batches[0])
    with untouched(run.state):
        ts.donate(run.step)(after, run.batches[1])


@every_part
@few
@given(data=st.data())
def test_resuming_from_a_checkpoint_at_any_step_changes_no_bit(
    subject: tuple[str, str], data: st.DataObject
) -> None:
    setup = data.draw(about(subject))
    at, donate = data.draw(st.integers(0, len(setup.sizes))), data.draw(st.booleans())
    run = build(setup)
    expected = run.train(run.state)
    state = run.state
    for batch in run.batches[:at]:
        state, _ = run.step(state, batch)
    tensors, metadata = ts.serialize.to_flat(state)
    stored = {path: tensor.clone() for path, tensor in tensors.items()}
    restored = ts.serialize.from_flat(stored, json.loads(json.dumps(metadata)))
    assert ts.digest(restored) == ts.digest(state)
    fresh = build(setup)  # nothing is left of the first run but the checkpoint
    assert ts.digest(fresh.train(restored, at, donate=donate)) == ts.digest(expected)


@few
@given(data=st.data())
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_changes_nothing_but_the_count(
    optimizer: str, data: st.DataObject
) -> None:
    setup = data.draw(about(("optimizer", optimizer)))
    run = build(evolve(setup, guard="skip", transforms=()))
    state, _ = run.step(run.state, run.batches[0])
    bad = {**run.batches[1], "y": run.batches[1]["y"] * float("nan")}
    after, metrics = run.step(state, bad)
    assert metrics["skipped"] == 1
    assert after.extras["skipped"] == state.extras["skipped"] + 1
    for part in ("params", "buffers", "opt_state"):
        assert ts.equal(getattr(after, part), getattr(state, part)), part


def factories(module: ModuleType, result: type) -> set[str]:
    """Return the names of a module's public functions that make a ``result``."""
    return {
        name
        for name, function in vars(module).items()
        if inspect.isfunction(function) and inspect.signature(function).return_annotation is result
    }


@pytest.mark.parametrize(
    ("module", "result", "table"),
    [(ts.optim, ts.Optimizer, OPTIMIZERS), (ts.transforms, ts.Transform, TRANSFORMS)],
    ids=["optim", "transforms"],
)
def test_everything_exported_is_in_a_table(
    module: ModuleType, result: type, table: dict[str, Any]
) -> None:
    made = factories(module, result)
    assert made, "the annotations changed: this test sees nothing"
    missing = made - {name.split("-")[0] for name in table}
    assert not missing, f"add to property_tests/strategies.py: {sorted(missing)}"
    assert set(GUARDS) >= {"skip", "raise", "spike-skip", "loss_scale"}
