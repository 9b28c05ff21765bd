"""``trainstep report``: what a run left behind, on one page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_page_holds_what_the_folder_holds(runs: Path, trainstep: Callable[..., Any]) -> None:
    data = trainstep("report", "a", "--json").data
    newest = trainstep("inspect", "a/checkpoint-8", "--json").data
    state = json.loads(Path("a/checkpoint-8/trainer_state.json").read_text())
    assert (data["step"], data["max_steps"], data["parameters"]) == (8, 8, 49)
    assert data["history"] == state["log_history"]
    assert [one["name"] for one in data["checkpoints"]] == ["checkpoint-4", "checkpoint-8"]
    assert data["checkpoints"][1]["digest"] == newest["digest"] == data["digests"]["8"]
    assert data["arguments"]["learning_rate"] == 0.1

    outcome = trainstep("report", "a")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[:3] == ["# a", "", "- step 8 of 8, epoch 2"]
    assert f"9 steps, 0 to 8; the last: `{newest['digest']}`" in lines
    assert "| `learning_rate` | `0.1` |" in lines
    size = sum(file["size"] for file in newest["files"]) / 1000
    assert f"| checkpoint-8 | {size:.1f} kB | `{newest['digest']}` | not verified |" in lines


def test_losses_are_a_table_by_step(runs: Path, trainstep: Callable[..., Any]) -> None:
    history: list[dict[str, Any]] = [{"loss": 2 / (1 + i), "step": i} for i in range(1, 101)]
    history.append({"eval_loss": 0.25, "eval_runtime": 3.0, "step": 100, "epoch": 1.0})
    state = {"global_step": 100, "max_steps": 100, "log_history": history}
    Path("a/trainer_state.json").write_text(json.dumps(state))  # as save_state() leaves it
    lines = trainstep("report", "a").out.splitlines()
    start = lines.index("| step | loss | eval_loss |")
    rows = lines[start + 2 : lines.index("", start)]
    assert len(rows) == 24
    assert rows[0] == "| 1 | 1 |  |"
    assert rows[-1] == "| 100 | 0.019802 | 0.25 |"
    assert "24 of 100 steps." in lines


def test_a_state_that_is_older_or_damaged_does_not_count(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    for text in ('{"global_step": 3, "log_history": []}', "[]", "{"):
        Path("a/trainer_state.json").write_text(text)
        assert trainstep("report", "a", "--json").data["step"] == 8


def test_damage_is_told(
    runs: Path, trainstep: Callable[..., Any], flip_bit: Callable[..., None]
) -> None:
    flip_bit(Path("a/checkpoint-8/model.safetensors"))
    assert trainstep("report", "a").status == 0  # not looked at
    outcome = trainstep("report", "a", "--verify")
    assert outcome.status == 1
    assert "| model.safetensors: its SHA-256 is " in outcome.out
    assert "| verified |" in outcome.out  # the other one
    Path("a/checkpoint-8/manifest.json").unlink()
    outcome = trainstep("report", "a")
    assert outcome.status == 1
    assert "- step 4 of 8" in outcome.out
    assert "`trainstep verify a/checkpoint-8` says more |" in outcome.out


def test_no_run(tmp_path: Path, runs: Path, refused: Callable[..., str]) -> None:
    assert "no checkpoint of this package in it" in refused("report", tmp_path / "nothing")
    for step in (4, 8):
        Path(f"a/checkpoint-{step}/manifest.json").unlink()
    assert "in it, 2 that cannot be read" in refused("report", "a")
    Path("b/digests.jsonl").write_text("x\n")
    assert "digests.jsonl" in refused("report", "b")
