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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainstep.compare import leaf_digest

CHUNK = 1 << 20
"""Bytes that are read and hashed or compared at a time: few enough to stay in the cache."""
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
    """The digests of one save or one verification, each computed in one of a few threads.

    Attributes:
        tasks: the threads.
        leaves: the digest of every leaf that was handed over, by path; complete after ``join``.
    """

    def __init__(self) -> None:
        self.tasks = Workers(max(1, min(4, os.cpu_count() or 1)))
        self.leaves: dict[str, str] = {}

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.tasks.close()

    def leaf(self, path: str, tensor: Tensor) -> None:
        """Digest a contiguous host tensor under its path. It must not change until ``join``."""
        if tensor.numel() * tensor.element_size() < _SMALL:
            self._digest(path, tensor)
        else:
            self.tasks.put(self._digest, path, tensor)

    def file(self, path: Path) -> Any:
        """Hash a whole file; return its SHA-256 object, final after ``join``."""
        sha = new_sha()
        self.tasks.put(hash_file, path, sha)
        return sha

    def join(self) -> None:
        """Wait for everything that was handed over; raise the first exception, if any."""
        self.tasks.join()

    def _digest(self, path: str, tensor: Tensor) -> None:
        self.leaves[path] = leaf_digest(path, tensor).hex()


def new_sha(data: bytes = b"") -> Any:
    """Return a SHA-256 that has seen ``data``."""
    return hashlib.sha256(data)


def hash_file(path: Path, sha: Any) -> None:
    """Feed a whole file to a SHA-256."""
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(buffer[:count])
