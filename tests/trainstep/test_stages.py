"""Which batches are recorded, and what is said of those that are not."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.recordings import Pretended, pretend
from trainstep.stages import Inputs, Note, as_input


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch)


def total(batch: Any, key: Any) -> Tensor:
    return sum(leaf.sum() for leaf in ts.tree.leaves(batch) if isinstance(leaf, Tensor))


def go(batches: list[Any], limit: int = 2) -> None:
    inputs = Inputs(torch.device("cpu"), None, limit)
    for batch in batches:
        assert inputs(total, batch, ts.rng.key(0)) == total(batch, None)


def test_a_shape_is_run_rehearsed_recorded_and_replayed(told: Pretended) -> None:
    go([{"x": torch.full((2,), float(n))} for n in range(5)])
    assert (told.rehearsals, told.recordings, told.replays) == (1, 1, 3)


def test_too_many_shapes(told: Pretended) -> None:
    with pytest.warns(UserWarning, match=r"\(\(3,\)\) has another shape than the 2") as all_said:
        go([{"x": torch.ones(n)} for n in (1, 2, 3, 4, 3)])
    assert len(all_said) == 1


def test_numbers_that_change_are_named_rather_than_shapes(told: Pretended) -> None:
    with pytest.warns(UserWarning, match=r"no tensor \(2\).*Make them tensors"):
        go([{"x": torch.ones(2), "id": n} for n in range(4)])


def test_kinds_of_batches_are_named(told: Pretended) -> None:
    with pytest.warns(UserWarning, match="of which it is red is of another kind than the 2"):
        go([{"x": torch.ones(2), "note": Note(f"it is {c}")} for c in ("blue", "green", "red")])


def test_a_dict_goes_in_as_it_is_and_other_mappings_as_dicts() -> None:
    batch = {"x": torch.ones(2)}
    assert as_input(batch) is batch
    found = as_input((UserDict(batch), None))
    assert type(found[0]) is dict
    assert found[0]["x"] is batch["x"]
