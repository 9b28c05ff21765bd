"""A real process, killed by SIGKILL several times, ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.processes import ROOT
from support.shell import timeless

SMALL = (
    "--steps 40 --eval-steps 20 --save-steps 5 --sample 0 --quiet --accumulate 2 --batch-size 8 "
    "--length 32 --width 64 --layers 2"
)
LIMIT = 120  # seconds, for a process that does not come to the point where it is to be killed


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the example, with its output in a file beside ``out``."""
    command = [sys.executable, str(ROOT / "examples" / "char_lm.py"), *SMALL.split(), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=log, stderr=log
        )


def finish(out: Path, *more: str) -> dict[str, Any]:
    """Run the example to its end and return its result, with the records that it wrote."""
    process = start(out, *more)
    assert process.wait(LIMIT) == 0, out.with_suffix(".log").read_text()
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    state = json.loads((out / "trainer_state.json").read_text())
    return result | {"history": timeless(state["log_history"])}


def newest(out: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")), default=0)


def writing(out: Path) -> bool:
    """Tell whether a checkpoint is being written."""
    try:
        return any(out.glob(".tmp-checkpoint-*/*"))
    except OSError:  # it was moved to its place meanwhile
        return False


def kill_when(out: Path, ready: Callable[[], bool], delay: float, *more: str) -> None:
    """Start the example, wait until ``ready`` and ``delay`` seconds longer, and kill it."""
    process = start(out, *more)
    end = time.monotonic() + LIMIT
    while not ready():
        assert process.poll() is None, out.with_suffix(".log").read_text()
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == -signal.SIGKILL, "it had ended already"
    assert not (out / "result.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Killed before the first checkpoint, at two random moments, and while a checkpoint is written."""
    whole = finish(tmp_path / "whole")
    assert whole["step"] == 40

    out, draw = tmp_path / "killed", random.Random(0)
    kill_when(out, lambda: out.is_dir(), draw.uniform(0.0, 0.2))
    reached = 0
    for target in (draw.randint(5, 10), draw.randint(15, 25)):
        kill_when(
            out,
            lambda target=target: newest(out) >= target,  # type: ignore[misc]
            draw.uniform(0.0, 0.3),
            "--resume",
        )
        assert newest(out) >= max(target, reached)
        reached = newest(out)
    kill_when(out, lambda: writing(out), 0.0, "--resume")
    assert newest(out) >= reached

    assert finish(out, "--resume") == whole
    assert not list(out.glob(".*-checkpoint-*"))
    log = out.with_suffix(".log").read_text()
    assert "Traceback" not in log
