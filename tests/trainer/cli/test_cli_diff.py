"""``trainstep diff``: numbers of the differences, checked against values known by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from trainer import checkpoint

Write = Callable[..., Path]


def leaf(data: Any, path: str) -> Any:
    return next(one for one in data["leaves"] if one["path"] == path)


def test_equal_checkpoints(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("diff", "a/checkpoint-4", "b/checkpoint-4")
    assert (outcome.status, outcome.out) == (0, "no difference\n")
    data = trainstep("diff", "a/checkpoint-4", "b/checkpoint-4", "--json").data
    assert data["same"] is data["state_same"] is True
    assert data["leaves"] == []


def test_every_leaf_that_differs_is_there(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("diff", "a/checkpoint-8", "b/checkpoint-8", "--json")
    states = [checkpoint.load(f"{run}/checkpoint-8").state for run in "ab"]
    assert outcome.status == 1
    assert [(one["path"], one["what"], one["max_ulp"]) for one in outcome.data["leaves"]] == [
        tuple(difference) for difference in ts.diff(*states)
    ]


def test_first_and_largest_difference(
    tmp_path: Path, write_checkpoint: Write, trainstep: Callable[..., Any]
) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    y = x.clone()
    y[0, 1] = math.nextafter(1.0, 2.0) + 2**-22  # rounds to 1 + 2 ulp
    y[1, 2] += 0.5
    a = write_checkpoint(tmp_path / "a", {"w": x, "same": x})
    b = write_checkpoint(tmp_path / "b", {"w": y, "same": x})
    outcome = trainstep("diff", a, b, "--json")

    assert outcome.status == 1
    assert [one["path"] for one in outcome.data["leaves"]] == ["params/w"]
    found = leaf(outcome.data, "params/w")
    assert (found["differing"], found["numel"]) == (2, 6)
    assert found["first"] == {"index": [0, 1], "a": 1.0, "b": 1 + 2**-22}
    assert found["largest"] == {"index": [1, 2], "a": 5.0, "b": 5.5}
    assert found["max_abs"] == 0.5
    assert found["max_ulp"] == 2**20  # 0.5 at 5.0, where an ulp is 2**-21
    text = trainstep("diff", a, b).out
    assert (
        "params/w: 2 of 6 differ, by 1,048,576 ulp at most; first at (0, 1): 1 != 1.00000024; "
        "largest at (1, 2): 5 != 5.5, by 0.5\n"
    ) in text


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), (1, [0], 0.0, 0)),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.5, 2.0]), (2, [1], None, None)),
        (torch.tensor([1.0, 1.0]), torch.tensor([1.5, math.inf]), (2, [1], None, 1 << 30)),
        (torch.tensor(3), torch.tensor(5), (1, [], 2.0, 2)),
        (torch.tensor([True, False]), torch.tensor([True, True]), (1, [1], 1.0, 1)),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 3j]), (1, [0], 2.0, 3 << 22)),
        (
            torch.tensor([1.0], dtype=torch.bfloat16),
            torch.tensor([1.0078125], dtype=torch.bfloat16),
            (1, [0], 0.0078125, 1),
        ),
    ],
    ids=["zeros", "nan", "infinity", "integer", "bool", "complex", "bfloat16"],
)
def test_values_of_every_kind(
    x: Any,
    y: Any,
    expected: tuple[Any, ...],
    tmp_path: Path,
    write_checkpoint: Write,
    trainstep: Callable[..., Any],
) -> None:
    a = write_checkpoint(tmp_path / "a", {"w": x})
    b = write_checkpoint(tmp_path / "b", {"w": y})
    found = leaf(trainstep("diff", a, b, "--json").data, "params/w")
    differing, index, max_abs, max_ulp = expected
    assert (found["differing"], found["largest"]["index"]) == (differing, index)
    assert found["max_abs"] == max_abs
    assert found["max_ulp"] == max_ulp
    assert trainstep("diff", a, b).status == 1


def test_other_shapes_missing_leaves_and_plain_values(
    tmp_path: Path, write_checkpoint: Write, trainstep: Callable[..., Any]
) -> None:
    a = write_checkpoint(tmp_path / "a", {"w": torch.ones(2), "old": torch.ones(1)})
    b = write_checkpoint(tmp_path / "b", {"w": torch.ones(3)}, step=4)
    data = trainstep("diff", a, b, "--json").data
    assert leaf(data, "params/old")["what"] == "only in the first"
    assert leaf(data, "params/w")["what"] == "torch.float32 (2,) != torch.float32 (3,)"
    assert leaf(data, "step")["what"] == "3 != 4"
    assert leaf(data, "step")["differing"] is None
    assert data["position"] == {"batch": [3, 4]}


def test_arguments_count_unless_only_states_are_asked_for(
    tmp_path: Path, write_checkpoint: Write, trainstep: Callable[..., Any]
) -> None:
    params = {"w": torch.ones(2)}
    a = write_checkpoint(tmp_path / "a", params)
    b = write_checkpoint(tmp_path / "b", params, arguments={"learning_rate": 0.2})
    c = write_checkpoint(tmp_path / "c", params)

    outcome = trainstep("diff", a, b)
    assert outcome.status == 1
    assert outcome.out.splitlines() == [
        "the states are equal",
        "arguments",
        "  learning_rate  0.1 != 0.2",
    ]
    assert trainstep("diff", a, b, "--state").status == 0
    assert trainstep("diff", a, c).status == 0  # another output_dir is no difference


def test_what_cannot_be_compared(
    runs: Path,
    write_checkpoint: Write,
    refused: Callable[..., str],
    flip_bit: Callable[..., None],
) -> None:
    assert "give one of checkpoint-4, checkpoint-8" in refused("diff", "a", "b/checkpoint-4")
    flip_bit(Path("a/checkpoint-4/model.safetensors"))
    message = refused("diff", "a/checkpoint-4", "b/checkpoint-4")
    assert "the checkpoint cannot be used: model.safetensors: its SHA-256 is" in message
    only = write_checkpoint(runs / "only", {}, state=None)
    assert "saved with save_only_model" in refused("diff", only, "b/checkpoint-4")
