"""A disk that can be made to fail, or to be all that is left of a process, at any call."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from trainer.checkpoint import io


class Killed(BaseException):
    """The process ended here: nothing after it reaches the disk."""


class Disk:
    """Counts the calls in ``trainer.checkpoint.io`` and makes chosen ones fail.

    Modes: ``raise`` fails one call, ``dead disk`` that one and all later ones, ``kill`` ends the process
    before the call, ``torn`` in the middle of it. After a kill no call does anything any more.
    """

    CALLS = ("make_folder", "create", "write", "sync_open", "sync_file", "sync_folder", "rename")
    CALLS += ("unlink", "remove_folder")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Path]] = []
        self.at: int | None = None
        self.mode = ""
        self.lock = threading.Lock()
        for name in self.CALLS:
            monkeypatch.setattr(io, name, self._wrap(name, getattr(io, name)))
        # Models without a way of their own to be saved are written by this.
        model = self._wrap("write_model", _write_model)

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            model(Path(path), tensors, metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    def arm(self, at: int | None, mode: str = "") -> None:
        self.log.clear()
        self.at, self.mode = at, mode

    @property
    def reached(self) -> bool:
        return self.at is not None and len(self.log) > self.at

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            first = arguments[0]
            with self.lock:  # several threads write
                index = len(self.log)
                self.log.append((name, first if isinstance(first, Path) else Path(first.name)))
            if self.at is None or index < self.at:
                return call(*arguments)
            if self.mode == "kill" or (self.mode == "torn" and index > self.at):
                raise Killed
            if self.mode == "torn":
                _tear(name, call, arguments)
                raise Killed
            if index == self.at or self.mode == "dead disk":
                raise OSError(5, f"{name} failed")
            return call(*arguments)

        return wrapped


_save_file = safetensors.torch.save_file


def _write_model(path: Path, tensors: Any, metadata: Any = None) -> None:
    _save_file(tensors, path, metadata)


def _tear(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do a call, half of it where there are halves."""
    first = arguments[0]
    if name == "write":
        call(first, arguments[1][: len(arguments[1]) // 2])
        first.flush()
        return
    result = call(*arguments)
    if name == "create":
        result.close()
    elif name == "write_model":
        os.truncate(first, first.stat().st_size // 2)
