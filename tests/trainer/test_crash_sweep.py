"""Whole runs that fail or die at any call that writes, syncs, renames or deletes: nothing is lost.

``tests/trainer/checkpoint`` does this to single saves, call by call; here it is done to runs that save,
rotate and train on, directly and in the background, in both formats. Every interrupted run is taken up
again, and has to end with the bits of the run that nothing interrupted. By default a sample of the
calls is tried; ``TRAINSTEP_FULL=1`` (``make test-full``) tries all.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import trainstep as ts
from support.disk import Disk, Killed
from support.full import FULL
from support.resume import noisy_collate
from support.shell import make_trainer, scored
from trainer import CheckpointError, checkpoint

STEPS = 6
SPREAD = 5
"""How many calls all over a run are tried by default, of each way to save and each mode."""
WAYS: dict[str, dict[str, Any]] = {
    "direct": {},
    "background": {"async_save": True},
    "hf": {"checkpoint_format": "hf"},
    "hf background": {"checkpoint_format": "hf", "async_save": True},
}
MODES = ("raise", "dead disk", "kill", "torn")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return Disk(monkeypatch)


def run(folder: Path, way: str, seed: int = 0) -> Any:
    """A run of six updates over an epoch's end, saved after the second, the fourth and the sixth."""
    return make_trainer(
        folder,
        scored("dropout", seed=seed),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        more={"data_collator": noisy_collate},
        **WAYS[way],
    )


def calls(folder: Path, way: str, disk: Disk) -> list[str]:
    """Return the names of the calls that an uninterrupted run makes."""
    disk.arm(None)
    run(folder, way).train()
    return [name for name, _ in disk.log]


def chosen(names: list[str], way: str, mode: str) -> list[int]:
    """Return the calls to interrupt.

    A sample has some that are spread over the run, and some of the kinds of calls: every kind meets
    every mode in one of the ways to save.
    """
    if FULL:
        return list(range(len(names)))
    turn = MODES.index(mode)
    spread = {(SPREAD * turn + i) * len(names) // (SPREAD * len(MODES)) for i in range(SPREAD)}
    number = (turn + list(WAYS).index(way)) % len(MODES)
    kinds = sorted(set(names))[number :: len(MODES)]
    return sorted(spread | {places(names, kind)[turn] for kind in kinds})


def places(names: list[str], kind: str) -> list[int]:
    """Return four of the calls of a kind."""
    found = [at for at, name in enumerate(names) if name == kind]
    return [found[i * len(found) // len(MODES)] for i in range(len(MODES))]


@pytest.mark.row(191)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_the_same_bits_wherever_it_was_interrupted(
    way: str, mode: str, disk: Disk, tmp_path: Path
) -> None:
    whole = make_trainer(
        tmp_path / "whole",
        scored("dropout"),
        max_steps=STEPS,
        more={"data_collator": noisy_collate},
    )
    whole.train()
    for at in chosen(calls(tmp_path / "counted", way, disk), way, mode):
        folder = tmp_path / str(at)
        disk.arm(at, mode)
        trainer = run(folder, way)
        with suppress(CheckpointError, Killed):
            trainer.train()
        died = disk.reached and mode in ("kill", "torn")
        disk.arm(None)
        if not died:  # a disk that fails does not disturb training
            assert ts.equal(trainer.train_state, whole.train_state), at
        newest, passed_over = checkpoint.newest(folder)
        assert passed_over == [], at
        again = run(folder, way, seed=1 if newest else 0)
        again.train(resume_from_checkpoint=True if newest else None)
        assert ts.diff(again.train_state, whole.train_state) == [], at
        saved_again = newest is None or newest.name != f"checkpoint-{STEPS}"
        assert_tidy(folder, saved_again, at)


def assert_tidy(folder: Path, saved_again: bool, at: int) -> None:
    """Assert that whole checkpoints are left, the newest among them, and after a save nothing else."""
    left = {path.name for path in folder.iterdir()}
    hidden = set() if saved_again else {name for name in left if name.startswith(".")}
    assert f"checkpoint-{STEPS}" in left, (at, left)
    assert all(checkpoint.verify(folder / name) == [] for name in left - hidden), (at, left)


def test_the_sweep_has_enough_points(disk: Disk, tmp_path: Path) -> None:
    """At least 500; and the sample lets every kind of call fail in every mode."""
    total = 0
    sampled: set[tuple[str, str]] = set()
    for way in WAYS:
        names = calls(tmp_path / way, way, disk)
        total += len(names) * len(MODES)
        sampled |= {(names[at], mode) for mode in MODES for at in chosen(names, way, mode)}
    assert total >= 500
    assert sampled == {(kind, mode) for kind in (*Disk.CALLS, "write_model") for mode in MODES}
