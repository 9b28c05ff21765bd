"""``BackgroundWriter``: saves in a thread, so that a step waits only for a copy to the host."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.contents import Buffers, Contents
from trainer.checkpoint.writer import save


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, to the same bytes as ``save``.

    An exception in the thread is kept and raised once, by the next ``submit``, ``wait`` or ``check``.
    The thread is no daemon: a program that ends normally waits for it. The memory of the copy is kept
    for the next one, until ``close``.
    """

    def __init__(self) -> None:
        self._buffers = Buffers()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self,
        root: str | os.PathLike[str],
        step: int,
        contents: Contents,
        on_done: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy ``contents`` to the host and start saving them.

        Waits first for the save that is under way, if any. After the return the caller may change the
        tensors; those that ``contents.write_model`` reads must be in ``contents.model_tensors``.

        Args:
            root: the folder with the checkpoints.
            step: the checkpoint's step.
            contents: what to save.
            on_done: called in the thread with the checkpoint's path once it is safe; rotate there.

        Raises:
            CheckpointError: the previous save failed; the new one was not started. Call again to
                start it, the failure is raised once.
        """
        self.wait()
        self._buffers.recycle()
        copied = contents.frozen_copy(self._buffers)
        self._thread = threading.Thread(
            target=self._work, args=(root, step, copied, on_done), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way, and raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait as ``wait`` does, and give the memory of the copies back."""
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def check(self) -> None:
        """Raise what went wrong in a save that has ended; never waits."""
        if self._failure is not None and not self.busy:
            failure, self._failure = self._failure, None
            raise failure

    def _work(
        self,
        root: str | os.PathLike[str],
        step: int,
        contents: Contents,
        on_done: Callable[[Path], None] | None,
    ) -> None:
        try:
            path = self._save(root, step, contents)
            if on_done is not None:
                on_done(path)
        except BaseException as error:
            self._failure = error

    def _save(self, root: str | os.PathLike[str], step: int, contents: Contents) -> Path:
        return save(root, step, contents)
