"""Every call by which a save or a rotation changes the disk.

They go through here so that tests can make each of them fail, or stop the process there.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}
"""What file systems answer that cannot sync a folder; nothing more can be done there."""


def make_folder(path: Path) -> None:
    """Create one folder, with the permissions that the umask gives."""
    path.mkdir()


def create(path: Path) -> BinaryIO:
    """Open a new file for writing; FileExistsError if there is one."""
    return open(path, "xb")


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of ``data``."""
    file.write(data)


def sync_open(file: BinaryIO) -> None:
    """Bring an open file to the disk: its buffer, then the system's cache."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring a closed file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder within its parent; atomic."""
    os.rename(source, target)


def unlink(path: Path) -> None:
    """Remove a file or a symbolic link."""
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(path)


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written where ``folder`` lies."""
    return shutil.disk_usage(folder).free


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, or a link, through the calls above. Nothing there is fine."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        with suppress(FileNotFoundError):
            unlink(path)
        return
    for parent, folders, files in os.walk(path, topdown=False):
        for name in files + folders:
            inner = Path(parent, name)
            with suppress(FileNotFoundError):
                if inner.is_dir() and not inner.is_symlink():
                    remove_folder(inner)
                else:
                    unlink(inner)
    with suppress(FileNotFoundError):
        remove_folder(path)
