"""Putting a finished checkpoint in its place, and clearing what killed processes left beside."""

import os
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint import io
from trainer.checkpoint.layout import MANIFEST, checkpoint_dir, sibling_dir, siblings


def publish(temporary: Path, final: Path, step: int) -> None:
    """Put the finished folder in its place; the one that is there stays until the new one is safe."""
    old = sibling_dir(final.parent, "old", step)
    # An old one that is still there is the good one (see ``tidy``); what has its place is not.
    aside = sibling_dir(final.parent, "gone", step) if old.exists() else old
    replaces = final.exists()
    if replaces:
        io.rename(final, aside)
    try:
        io.rename(temporary, final)
    except BaseException:
        if replaces:
            with suppress(OSError):
                io.rename(aside, final)
        raise
    io.sync_folder(final.parent)
    for path in (aside, old):
        with suppress(OSError):
            io.remove_tree(path)


def tidy(root: Path, step: int) -> None:
    """Remove what killed saves and rotations left in ``root``, and put back what one set aside.

    Touches the hidden folders of this process and of those that are gone, and those of ``step``
    whoever's they are. Folders that this process is writing for another step stay, as does what
    cannot be removed.
    """
    for path, kind, its_step, pid in siblings(root):
        mine = pid == os.getpid()
        gone = not mine and not _alive(pid)
        with suppress(OSError):
            if kind == "old":
                place = checkpoint_dir(root, its_step)
                if (mine or gone) and not place.exists():
                    io.rename(path, place)  # killed between the two renames of publish
                elif (mine or gone) and (place / MANIFEST).exists():
                    io.remove_tree(path)
            elif gone or its_step == step or (mine and kind == "gone"):
                io.remove_tree(path)


def _alive(pid: int) -> bool:
    """Tell whether a process of this machine has that number; True where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
