"""Hashing beside reading and writing: threads that keep the digests off the disk's path.

``hashlib`` and NumPy release the interpreter lock on large buffers. Plain threads rather than an
executor: executors refuse work while the interpreter shuts down, which is when the last background
save may still be running.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainstep.compare import leaf_digest

CHUNK = 1 << 24
"""Bytes that are written and hashed at a time."""
_SMALL = 1 << 16
"""Leaves below this size are hashed on the spot: handing them over would cost more."""


def host_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor's values contiguous on the host; no copy if they are so already."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, without copying."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def same_bytes(a: memoryview | bytearray, b: memoryview | bytearray) -> bool:
    """Tell whether two buffers are equal; lets other threads run meanwhile."""
    left, right = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if left.size != right.size:
        return False
    whole = left.size - left.size % 8  # eight bytes at a time, and what is left
    same = np.array_equal(left[:whole].view(np.uint64), right[:whole].view(np.uint64))
    return bool(same and np.array_equal(left[whole:], right[whole:]))


class Workers:
    """A few threads that take calls from one short queue, so that little memory waits there."""

    def __init__(self, count: int) -> None:
        self._calls: queue.Queue[Any] = queue.Queue(maxsize=4 * count)
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def put(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call; waits while the queue is full."""
        self._calls.put((call, arguments))

    def join(self) -> None:
        """Wait until every queued call is done; raise the first one's exception, if any."""
        self._calls.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """End the threads after what is queued."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, arguments = item
            try:
                call(*arguments)
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                del item, call, arguments  # or the last tensor would live until the next one
                self._calls.task_done()
        self._calls.task_done()


class Hashing:
    """The digests of one save or one verification: whole files in order, leaves in any order."""

    def __init__(self) -> None:
        self._files = Workers(1)
        self.tasks = Workers(max(1, min(4, (os.cpu_count() or 2) - 1)))
        self.leaves: dict[str, str] = {}

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._files.close()
        self.tasks.close()

    def update(self, sha: Any, data: bytes | memoryview) -> None:
        """Feed ``data`` to a file's SHA-256, after what was fed before. It must not change."""
        self._files.put(sha.update, data)

    def leaf(self, path: str, tensor: Tensor) -> None:
        """Digest a contiguous host tensor under its path; it is in ``leaves`` after ``join``."""
        if tensor.numel() * tensor.element_size() < _SMALL:
            self.digest(path, tensor)
        else:
            self.tasks.put(self.digest, path, tensor)

    def digest(self, path: str, tensor: Tensor) -> None:
        """Digest a leaf in this thread."""
        self.leaves[path] = leaf_digest(path, tensor).hex()

    def join(self) -> None:
        """Wait for everything that was queued."""
        self._files.join()
        self.tasks.join()


def new_sha() -> Any:
    """Return a fresh SHA-256."""
    return hashlib.sha256()
