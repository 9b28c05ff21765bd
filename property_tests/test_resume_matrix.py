"""A run taken up from a checkpoint ends with the bits of the run that was never interrupted.

In every combination of data, workers, randomness, accumulation, place, way of saving, and feature.
By default a sample of the combinations is run in which every two values meet; ``TRAINSTEP_FULL=1``
(``make test-full``) runs all of them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support.full import FULL
from support.resume import AXES, INTERRUPTED, all_cells, build, name, pairs, pairwise
from support.shell import outcome

CELLS = all_cells(AXES) if FULL else pairwise(AXES)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder and outcome of a run that was not interrupted, which some cells share."""
    runs: dict[str, tuple[Path, Any]] = {}

    def run(cell: dict[str, Any]) -> tuple[Path, Any]:
        key = name({axis: value for axis, value in cell.items() if axis != "at"})
        if key not in runs:
            for folder, _ in runs.values():
                shutil.rmtree(folder, ignore_errors=True)
            runs.clear()
            folder = tmp_path_factory.mktemp("whole")
            trainer = build(cell, folder)
            runs[key] = folder, (outcome(trainer, trainer.train()), trainer.train_state)
        return runs[key]

    return run


def text(value: Any) -> str:
    """As a text, a loss that is not a number equals itself."""
    return json.dumps(value, sort_keys=True)


def shared(cell: dict[str, Any]) -> list[str]:
    """Orders cells so that those of the same uninterrupted run follow one another."""
    return [str(value) for axis, value in cell.items() if axis != "at"]


@pytest.mark.parametrize("cell", sorted(CELLS, key=shared), ids=name)
def test_taken_up_as_if_never_interrupted(cell: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    folder, (expected, state) = whole(cell)
    step = INTERRUPTED[cell["at"]][cell["accumulation"]]
    torch.manual_seed(step)  # nothing may depend on where the process stands
    trainer = build(cell, tmp_path, seed=1)
    result = trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert ts.diff(trainer.train_state, state) == []
    assert text(outcome(trainer, result)) == text(expected)


def test_the_sample_has_every_two_values_together() -> None:
    sample = pairwise(AXES)
    assert sample == pairwise(AXES)
    assert set.union(*map(pairs, sample)) == set.union(*map(pairs, all_cells(AXES)))
    assert len(sample) <= 20


def test_features_do_what_they_are_for(tmp_path: Path) -> None:
    """Else the matrix would prove less than it says."""
    cell = pairwise(AXES)[0] | {"data": "map", "workers": 0, "accumulation": 1}
    found: dict[str, ts.TrainState] = {}
    for feature in AXES["feature"]:
        trainer = build(cell | {"feature": feature}, tmp_path / feature.replace(" ", "_"))
        trainer.train()
        found[feature] = trainer.train_state
    paths = {path for path, _ in ts.tree.leaves_with_paths(found["ema"].opt_state)}
    assert any("average" in path for path in map(str, paths))
    assert float(found["loss scale"].extras["loss_scale"]["scale"]) > 0
    assert int(found["skip guard"].extras["skipped"]) >= 2
