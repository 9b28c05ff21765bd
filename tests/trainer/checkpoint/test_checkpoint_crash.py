"""A save may fail or die at any call that it makes: a complete checkpoint always remains."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trainstep as ts
from trainer.checkpoint import CheckpointError, Contents, io, load, newest, rotate, save, verify
from trainstep.state import TrainState

MODES = ("raise", "dead disk", "kill", "torn")


def small(step: int) -> TrainState:
    """Return a small state that tells its step."""
    weight = torch.full((3,), float(step))
    return TrainState(step, {"w": weight}, {}, {"m": weight * 2}, ts.rng.key(step))


def contents(step: int) -> Contents:
    """Return contents whose model's files are written through the failing disk as well."""

    def write_model(folder: Path) -> None:
        io.make_folder(folder / "processor")
        for name in ("config.json", "processor/vocab.txt"):
            with io.create(folder / name) as file:
                io.write(file, b"some text")
        save_file({"w": torch.full((3,), float(step))}, folder / "model.safetensors")

    return Contents(write_model, small(step), {"index": step}, "{}", {}, {0: {"x": step}})


def first(root: Path) -> None:
    """Save where nothing is."""
    save(root, 10, contents(10))


def rotated(root: Path) -> None:
    """Save and delete what is older."""
    save(root, 10, contents(10))
    rotate(root, 1)


def replaced(root: Path) -> None:
    """Save a step that is there already (with another state)."""
    save(root, 5, contents(10))


def recovered(root: Path) -> None:
    """Save where a killed save left its folders, and one checkpoint set aside."""
    save(root, 10, contents(10))


def prepare(root: Path, action: Callable[[Path], None]) -> None:
    """Make what is there before ``action``."""
    dead = 2**22 + 1
    if action is first:
        return
    save(root, 5, contents(5))
    if action is rotated:
        save(root, 4, contents(4))
    if action is recovered:
        (root / "checkpoint-5").rename(root / f".old-checkpoint-5-{dead}")
        for name in (f".tmp-checkpoint-10-{dead}", f".gone-checkpoint-3-{dead}"):
            (root / name / "inner").mkdir(parents=True)
            (root / name / "inner" / "file").write_text("x")


def calls(root: Path, action: Callable[[Path], None], disk) -> list[str]:
    """Return the names of the calls that ``action`` makes."""
    disk.arm(None)
    action(root)
    return [name for name, _ in disk.log]


@pytest.mark.row(191)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("action", [first, rotated, replaced, recovered])
def test_a_complete_checkpoint_remains_wherever_it_stops(tmp_path, disk, killed, action, mode):
    before = tmp_path / "before"
    before.mkdir()
    prepare(before, action)
    names = calls(shutil.copytree(before, tmp_path / "whole"), action, disk)
    assert len(names) > 25
    for at, name in enumerate(names):
        if mode == "torn" and name not in ("write", "create", "rename"):
            continue  # the others are done or not done
        root = shutil.copytree(before, tmp_path / str(at))
        disk.arm(at, mode)
        ended = False
        with suppress(CheckpointError, killed):
            action(root)
            ended = True
        assert disk.reached, at
        disk.arm(None)
        check_newest(root, action, ended)
        check_repeat(root, action)


def check_newest(root: Path, action: Callable[[Path], None], ended: bool) -> None:
    """Check that the newest checkpoint is the old or the new one, to the bit."""
    path, skipped = newest(root)
    assert skipped == []
    if path is None:
        assert action is first
        assert not ended
        return
    loaded = load(path)
    step = loaded.state.step
    assert step in ((10,) if ended or action is first else (5, 10))
    assert ts.diff(loaded.state, small(step)) == []
    assert loaded.position == {"index": step}


def check_repeat(root: Path, action: Callable[[Path], None]) -> None:
    """Check that the same action then succeeds and leaves nothing behind."""
    action(root)
    path, _ = newest(root)
    assert ts.diff(load(path).state, small(10)) == []
    names = {p.name for p in root.iterdir() if p.is_dir()}
    expected = {
        first: {"checkpoint-10"},
        rotated: {"checkpoint-10"},
        replaced: {"checkpoint-5"},
        recovered: {"checkpoint-5", "checkpoint-10"},
    }
    assert names == expected[action]
    assert all(verify(p) == [] for p in root.iterdir() if p.is_dir())


@pytest.mark.parametrize("at_rename", [0, 1, 2])
def test_a_failed_rename_leaves_the_old_one_in_its_place(tmp_path, disk, monkeypatch, at_rename):
    save(tmp_path, 5, contents(5))
    rename, seen = io.rename, []

    def fail_once(source: Path, target: Path) -> None:
        seen.append(source)
        if len(seen) == at_rename + 1:
            raise OSError(5, "rename failed")
        rename(source, target)

    monkeypatch.setattr(io, "rename", fail_once)
    with pytest.raises(CheckpointError, match="rename failed"):
        save(tmp_path, 5, contents(10))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert load(tmp_path / "checkpoint-5").state.step == 5


def test_there_is_never_an_instant_without_a_complete_checkpoint(tmp_path, disk, monkeypatch):
    save(tmp_path, 5, contents(5))
    seen = []
    for name in disk.CALLS:
        call = getattr(io, name)

        def watched(*arguments, call=call):
            result = call(*arguments)
            path, _ = newest(tmp_path)
            seen.append(load(path).state.step)
            return result

        monkeypatch.setattr(io, name, watched)
    save(tmp_path, 5, contents(10))
    assert seen == sorted(seen)
    assert set(seen) == {5, 10}


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
import trainstep as ts
from trainer.checkpoint import Contents, load, newest, rotate, save
from trainstep.state import TrainState

root, rounds = Path(sys.argv[1]), int(sys.argv[2])

def contents(step):
    w = torch.full((50_000,), float(step))
    state = TrainState(step, {"w": w}, {}, {"m": w * 2}, ts.rng.key(0))
    write = lambda folder: save_file({"w": w.clone()}, folder / "model.safetensors")
    return Contents(write, state, {"index": step}, "{}", {})

def train(start):
    for step in range(start, start + 10_000):
        save(root, step, contents(step))
        save(root, step, contents(step))  # replaces it
        rotate(root, 2)

random.seed(0)
save(root, 1, contents(1))
reached = 1
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        train(reached + 1)
        os._exit(1)
    time.sleep(random.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    path, skipped = newest(root)
    assert skipped == [], skipped
    state = load(path).state
    assert state.step >= reached, (state.step, reached)
    assert ts.equal(state, contents(state.step).state)
    reached = state.step
assert reached > 1
save(root, reached + 1, contents(reached + 1))
rotate(root, 1)
print(sorted(p.name for p in root.iterdir()) == [f"checkpoint-{reached + 1}"], reached)
"""


@pytest.mark.row(191)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_random_moments(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(KILLING), str(tmp_path), "20"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True"), done.stdout
