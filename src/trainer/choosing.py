"""Which checkpoint a run takes up, and reading it."""

import logging
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.distributed import agree, fsdp_plan

logger = logging.getLogger(__name__)

_MAX_SHOWN = 8
"""Checkpoints that a message lists; the rest is counted."""


def find_checkpoint(trainer: Any, wanted: str | Path | bool | None) -> checkpoint.Loaded | None:
    """Load the checkpoint to resume from: the newest that verifies, or the folder given, or none.

    Raises:
        ValueError: if ``wanted`` is True and no checkpoint verifies.
        NoCheckpoint: if the folder given is not there, or holds no checkpoint.
        CheckpointError: if it is damaged.
    """
    if not wanted:
        return None
    ranks = trainer._ranks

    def choose() -> Path | None:
        return _choose(trainer, wanted) if ranks.first else None

    def load() -> checkpoint.Loaded:
        if trainer._zero is not None:
            from trainer.distributed import deepspeed_resume

            return deepspeed_resume.open_checkpoint(Path(str(path)), ranks)
        # With parts of tensors, each process reads its own, when it knows which they are.
        read = checkpoint.open_lazily if fsdp_plan.wanted(trainer.args) else checkpoint.load
        return read(Path(str(path)))

    kind = ValueError if wanted is True else checkpoint.NoCheckpoint
    path = agree.from_first(ranks, agree.together(ranks, "resuming", choose, kind))
    found = agree.together(ranks, f"reading {path}", load, checkpoint.CheckpointError)
    if len(set(agree.gather(ranks, found.manifest.render()))) > 1:
        raise checkpoint.CheckpointError(
            f"{path}: the processes read different checkpoints under this name. Let all machines share "
            "a folder, or copy the checkpoint to each."
        )
    return found


def _choose(trainer: Any, wanted: str | Path | bool) -> Path:
    root = Path(trainer._get_output_dir(trial=None))
    if wanted is not True:
        given = Path(str(wanted))
        if not checkpoint.is_checkpoint(given):
            raise checkpoint.NoCheckpoint(_not_there(given, root))
        return given
    path, skipped = checkpoint.newest(root)
    for folder, reason in skipped:
        logger.warning("Checkpoint %s is passed over: %s", folder, reason)
    if path is None:
        reasons = "".join(f"\n  {folder.name}: {reason}" for folder, reason in skipped)
        raise ValueError(
            f"resume_from_checkpoint=True, but there is no complete checkpoint in {root}.{reasons}\n"
            "Call train() without it to start anew, or give the path of a checkpoint."
        )
    return path


def _not_there(path: Path, root: Path) -> str:
    """Say that there is no checkpoint at ``path``, and which there are in it or in ``root``."""
    what = "there is no checkpoint in this folder" if path.is_dir() else "there is no such folder"
    for folder in (path, root):
        if found := checkpoint.list_checkpoints(folder):
            names = ", ".join(each.name for each in found[-_MAX_SHOWN:])
            more = f", and {len(found) - _MAX_SHOWN} older ones" if len(found) > _MAX_SHOWN else ""
            return (
                f"{path}: {what}. In {folder} there are {names}{more}: give the path of one, or "
                "resume_from_checkpoint=True for the newest in output_dir."
            )
    return f"{path}: {what}, and none in output_dir {root}. Call train() without it to start anew."
