"""Moving batches to the device ahead of the computation that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainer import modeling
from trainer.evaluation.nested import leaves

_SMALL = 1 << 20  # bytes
# Bytes that CUDA copies from memory that is not pinned without waiting for the device (CUDA C++ Programming
# Guide, "Concurrent Execution between Host and Device"); pinning so little costs more than it gains.
_STAGED = 1 << 16


class Prefetch:
    """Yields batches in their order on a device, each moved while earlier ones are worked on.

    On CUDA the copies run on a stream of their own. They do not wait for the kernels that are queued,
    and the current stream waits for a copy only when its batch is handed out. That takes pinned host
    memory, which loaders provide or ``pin`` does. On other devices batches come as they are, none is
    fetched ahead; nor are batches of less than 1 MiB, which are copied sooner than a stream is told to
    wait.

    Args:
        device: Where batches are wanted.
        depth: Batches to have under way besides the one handed out. They take up that much memory on
            the device.
        pin: Pin tensors of more than 64 KiB that are not pinned yet: from other memory they would be
            copied only when the device has done all that is queued.

    Raises:
        ValueError: if ``depth`` is less than 1.
    """

    def __init__(self, device: torch.device, depth: int = 1, *, pin: bool = False) -> None:
        if depth < 1:
            raise ValueError(f"Prefetch: depth must be at least 1, got {depth}.")
        self.device, self.depth, self.pin = device, depth, pin
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate over ``batches``: nested mappings, lists and tuples of tensors."""
        if self._side is None:
            return iter(batches)
        return self._ahead(iter(batches), self._side)

    def _ahead(self, batches: Iterator[Any], side: torch.cuda.Stream) -> Iterator[Any]:
        under_way: deque[tuple[Any, torch.cuda.Event | None]] = deque()
        for batch in islice(batches, self.depth):
            under_way.append(self._start(batch, side))
        while under_way:
            for batch in islice(batches, 1):
                under_way.append(self._start(batch, side))
            yield self._finish(*under_way.popleft())

    def _start(self, batch: Any, side: torch.cuda.Stream) -> tuple[Any, torch.cuda.Event | None]:
        sizes = [tensor.nbytes for tensor in _tensors(batch)]
        if self.pin and max(sizes, default=0) > _STAGED:
            batch = modeling.with_tensors(batch, _pinned)
        if sum(sizes) < _SMALL:
            return batch, None
        with torch.cuda.stream(side):
            moved = modeling.move(batch, self.device, non_blocking=True)
            return moved, side.record_event()

    def _finish(self, moved: Any, copied: torch.cuda.Event | None) -> Any:
        if copied is None:
            return moved
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in _tensors(moved):
            if tensor.is_cuda:
                # Its memory belongs to the side stream, which may use it again once it is freed; not
                # before the work that is queued here by then is done.
                tensor.record_stream(current)
        return moved


def _pinned(tensor: Tensor) -> Tensor:
    # What is pinned already comes as it is.
    return tensor if tensor.is_cuda or tensor.nbytes <= _STAGED else tensor.pin_memory()


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))
