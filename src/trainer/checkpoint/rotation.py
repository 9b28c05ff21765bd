"""Rotation: which checkpoints go when there are too many."""

import os
from collections.abc import Collection
from pathlib import Path

from trainer.checkpoint import io
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import list_checkpoints, sibling_dir, step_of
from trainer.checkpoint.reader import newest

StrPath = str | os.PathLike[str]


def rotate(
    root: StrPath,
    limit: int | None,
    keep: Collection[StrPath] = (),
    *,
    saved: StrPath | None = None,
) -> list[Path]:
    """Delete the oldest checkpoints, by step, until ``limit`` are left; return what was deleted.

    The newest that verifies is never deleted, nor those in ``keep`` (the best one, say), so that more
    than ``limit`` may be left. If none verifies, the one of the highest step stays. Modification times
    play no role. A checkpoint vanishes from sight before its files are deleted: if this is cut off,
    no half of one is left under its name.

    Args:
        root: the folder with the checkpoints; other things in it are not touched.
        limit: how many to leave; None, zero or less deletes nothing.
        keep: checkpoints to leave, by path or by name.
        saved: the checkpoint that this process has just saved. It is left as well and, if it is the one
            of the highest step, not read again to see that it verifies.

    Raises:
        CheckpointError: if some could not be deleted, after trying all.
    """
    found = list_checkpoints(root)
    excess = 0 if limit is None or limit <= 0 else len(found) - limit
    if excess <= 0:
        return []
    named = [*keep, *([saved] if saved is not None else [])]
    kept = {Path(path).resolve() for path in named} | {Path(root, path).resolve() for path in named}
    if saved is None or found[-1].resolve() != Path(saved).resolve():
        kept.add((newest(root)[0] or found[-1]).resolve())
    doomed = [path for path in found if path.resolve() not in kept][:excess]
    failures = []
    for path in doomed:
        try:
            _delete(path)
        except OSError as error:
            failures.append(f"{path}: {error}")
    if failures:
        raise CheckpointError(
            "old checkpoints could not be deleted:\n  "
            + "\n  ".join(failures)
            + "\nDelete them by "
            "hand, or make their folder writable"
        )
    return doomed


def _delete(path: Path) -> None:
    if path.is_symlink():
        io.unlink(path)
        return
    gone = sibling_dir(path.parent, "gone", step_of(path) or 0)
    io.remove_tree(gone)
    io.rename(path, gone)
    io.remove_tree(gone)
