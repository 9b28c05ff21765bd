"""Two processes save parts of a state; one of them fails or dies at one call after the other."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainstep as ts
from support.disk import Disk, Killed
from support.ranks.launch import report
from trainer.checkpoint import CheckpointError, Contents, load, newest, verify
from trainer.checkpoint.pieces import Layout
from trainer.checkpoint.sharded import ShardedBackgroundWriter, save
from trainstep.serialize import to_flat
from trainstep.state import TrainState

RANK = int(os.environ.get("RANK", "0"))
MODES = ("raise", "dead disk", "kill", "torn")
ROWS = 4  # of a process


def whole(step: int) -> TrainState:
    """A state that tells its step."""
    weight = torch.arange(2.0 * ROWS * 3).reshape(2 * ROWS, 3) + step
    return TrainState(step, {"w": weight}, {}, {"m": weight * 2}, ts.rng.key(step))


def contents(step: int) -> Contents:
    """What this process has of it."""
    state = whole(step)
    leaves, metadata = to_flat(state)
    rows = slice(RANK * ROWS, (RANK + 1) * ROWS)
    parts = ts.tree.map(lambda leaf: leaf[rows], state)
    places = {leaf: (tuple(tensor.shape), (RANK * ROWS, 0)) for leaf, tensor in leaves.items()}
    layout = Layout(metadata, places, {"w": "params/w"})

    def write_model(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    return Contents(write_model, parts, {"index": step}, "{}", {}, {}, 2, layout=layout)


def directly(root: Path, step: int) -> None:
    save(root, step, contents(step), dist.group.WORLD)


def in_threads(root: Path, step: int) -> None:
    writer = ShardedBackgroundWriter(dist.group.WORLD)
    writer.submit(root, step, contents(step))
    writer.close()


def swept(folder: Path, disk: Disk) -> dict[str, Any]:
    """Interrupt a save at every call of either process; returns how many there were, and what was left."""
    found: dict[str, Any] = {"points": 0, "steps": [], "broken": []}
    for way in (directly, in_threads):
        disk.arm(None)
        way(folder / way.__name__, 5)
        counts: list[Any] = [None, None]
        dist.all_gather_object(counts, len(disk.log))
        for rank, count in enumerate(counts):
            for mode in MODES:
                for at in range(count):
                    point = f"{way.__name__} {rank} {mode} {at}"
                    step = interrupted(folder / point, way, disk, rank, mode, at)
                    found["points"] += 1
                    found["steps"].append(step)
                    if step not in (5, 10):
                        found["broken"].append(point)
    return found


def interrupted(root: Path, way: Any, disk: Disk, rank: int, mode: str, at: int) -> int:
    """Save step 10 beside step 5, with a disk that fails; returns the step that can be resumed from."""
    disk.arm(None)
    way(root, 5)
    disk.arm(at if rank == RANK else None, mode)
    with suppress(CheckpointError, Killed):
        way(root, 10)
    reached = disk.reached or rank != RANK
    disk.arm(None)
    dist.barrier()
    step = remaining(root) if reached else -1
    dist.barrier()
    way(root, 10)  # succeeds, and leaves nothing else behind
    if RANK == 0:
        left = sorted(path.name for path in root.iterdir())
        whole_now = left == ["checkpoint-10", "checkpoint-5"] and remaining(root) == 10
        step = step if whole_now and verify(root / "checkpoint-5") == [] else -2
        shutil.rmtree(root)
    dist.barrier()
    return step


def remaining(root: Path) -> int:
    """Return the step of the newest checkpoint, negative if that is not whole."""
    path, passed_over = newest(root)
    if path is None or passed_over:
        return -3
    state = load(path).state
    assert state is not None
    return state.step if ts.equal(state, whole(state.step)) else -4


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.fsync = lambda handle: None
    with pytest.MonkeyPatch.context() as patch:
        report(Path(sys.argv[1]), swept(Path(sys.argv[1]) / "runs", Disk(patch)))
    dist.destroy_process_group()
