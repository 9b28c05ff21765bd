"""The digits example: its randomness depends neither on interruptions nor on worker processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import ROOT
from support.shell import timeless

EXAMPLE = ROOT / "examples" / "digits.py"
SMALL = "--epochs 3 --width 4 --quiet"

pytestmark = pytest.mark.slow


def run(out: Path, *more: str) -> dict[str, Any]:
    """Run the example into ``out``; return its result and its log, without times."""
    pytest.importorskip("sklearn", reason="digits.py needs sklearn")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL.split(), *more, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    state = json.loads((out / "trainer_state.json").read_text())
    return result | {"history": timeless(state["log_history"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run from beginning to end, and its folder."""
    out = tmp_path_factory.mktemp("digits") / "whole"
    return out, run(out)


def test_resuming_gives_the_same_bits(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, expected = whole
    out = tmp_path / "resumed"
    shutil.copytree(folder, out)
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in checkpoints] == ["checkpoint-38", "checkpoint-57"]
    shutil.rmtree(checkpoints[-1])
    (out / "result.json").unlink()
    assert run(out, "--resume") == expected


def test_workers_give_the_same_bits(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert run(tmp_path / "workers", "--workers", "2") == whole[1]


def test_the_seed_matters(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert run(tmp_path / "other", "--seed", "1")["digest"] != whole[1]["digest"]
