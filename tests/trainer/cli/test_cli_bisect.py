"""``trainstep bisect``: the first step at which two runs differ, and what to do next."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any


def thin(log: Path, every: int) -> None:
    """Leave only the lines of every so many steps."""
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["step"] % every == 0))


def test_runs_without_a_difference(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("bisect", "a", "a/digests.jsonl")
    assert (outcome.status, outcome.out) == (0, "compared 9 steps, 0 to 8\nno difference\n")
    data = trainstep("bisect", "a", "a", "--json").data
    assert data["same"] is True
    assert data["first_different"] is data["loss"] is None
    assert data["narrow"] == []


def test_the_step_of_the_noise(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("bisect", "a", "b", "--json")
    assert outcome.status == 1
    data = outcome.data
    assert (data["last_equal"], data["first_different"]) == (4, 5)
    assert data["parts"] == ["params"]
    assert data["loss"]["a"] == data["loss"]["b"]
    assert data["narrow"] == [
        "trainstep diff a/checkpoint-8 b/checkpoint-8",
        "trainstep replay a/checkpoint-4 --script SCRIPT --steps 1",
        "trainstep replay b/checkpoint-4 --script SCRIPT --steps 1",
    ]


def test_the_interval_and_the_commands_that_narrow_it(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    for run in "ab":
        thin(Path(run, "digests.jsonl"), 3)
        Path(run, "run x").mkdir()  # a name that needs quotes in a shell
        for name in ("checkpoint-4", "checkpoint-8", "digests.jsonl"):
            Path(run, name).rename(Path(run, "run x", name))
    data = trainstep("bisect", "a/run x", "b/run x", "--json").data
    assert data["compared"] == [0, 3, 4, 6, 8]
    assert (data["last_equal"], data["first_different"]) == (4, 6)
    text = trainstep("bisect", "a/run x", "b/run x").out
    assert "it arose in one of the steps 5 to 6" in text

    for line in data["narrow"]:
        argv = [{"SCRIPT": "train.py"}.get(one, one) for one in shlex.split(line)]
        assert argv.pop(0) == "trainstep"
        if argv[0] == "replay" and "b/run x/checkpoint-4" in argv:
            argv += ["--", "--out", "b", "--noise", "5"]
        outcome = trainstep(*argv)
        assert outcome.status in (0, 1), outcome.err
    assert argv == ["bisect", "a.jsonl", "b.jsonl"]
    assert "first difference: step 5; step 4 is equal" in outcome.out


def test_checkpoints_alone_tell_leaf_by_leaf(runs: Path, trainstep: Callable[..., Any]) -> None:
    for run in "ab":
        Path(run, "digests.jsonl").unlink()
    data = trainstep("bisect", "a", "b", "--json").data
    assert data["compared"] == [4, 8]
    assert (data["last_equal"], data["first_different"]) == (4, 8)
    assert "params/body.2.bias" in {leaf["path"] for leaf in data["leaves"]}
    assert data["parts"] == ["opt_state", "params"]


def test_runs_that_differ_from_the_start(
    runs: Path, trainstep: Callable[..., Any], run_training: Callable[..., None]
) -> None:
    text = Path("train.py").read_text()
    Path("seeded.py").write_text(text.replace("manual_seed(0)", "manual_seed(1)"))
    run_training(Path("seeded.py"), "--out", "c")
    outcome = trainstep("bisect", "a", "c")
    assert outcome.status == 1
    assert "first difference: step 0; nothing before it was compared" in outcome.out
    assert "parts of the state that differ: params\n" in outcome.out
    assert "trainstep diff a/checkpoint-4 c/checkpoint-4" in outcome.out


def test_a_damaged_checkpoint_is_passed_over(
    runs: Path, trainstep: Callable[..., Any], flip_bit: Callable[..., None]
) -> None:
    flip_bit(Path("a/checkpoint-8/manifest.json"))
    outcome = trainstep("bisect", "a", "b")
    assert outcome.status == 1
    assert "first difference: step 5" in outcome.out
    assert "passed over: a/checkpoint-8: manifest.json: it is damaged" in outcome.out
    assert "trainstep diff" not in outcome.out


def test_a_checkpoint_that_is_not_the_state_logged_gives_way_to_the_log(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    # As where an evaluation between log and save changes the state.
    for run in "ab":
        log = Path(run, "digests.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines[8]["digest"] = "1" * 64
        log.write_text("".join(json.dumps(line) + "\n" for line in lines[6:]))
    data = trainstep("bisect", "a", "b", "--json").data
    assert data["compared"] == [4, 6, 7, 8]
    assert data["first_different"] == 6


def test_nothing_to_compare(runs: Path, refused: Callable[..., str]) -> None:
    Path("empty").mkdir()
    message = refused("bisect", "a", "empty")
    assert "empty: neither digests.jsonl nor a checkpoint in it; train with" in message
    Path("none.jsonl").touch()
    assert "none.jsonl: it is empty" in refused("bisect", "none.jsonl", "a")
    Path("late.jsonl").write_text(json.dumps({"step": 50, "digest": "00"}) + "\n")
    message = refused("bisect", "a", "late.jsonl")
    assert "no step in common: a has 9 from 0 to 8, late.jsonl has 1 from 50 to 50" in message
