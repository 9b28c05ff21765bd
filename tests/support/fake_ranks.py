"""Ranks that are threads of this process, for properties of collectives over many numbers of them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class Ranks:
    """Stands in for ``torch.distributed`` where the collectives of the core look for it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.backends = "cpu:threads,cuda:threads"
        self.DeviceMesh = type("DeviceMesh", (), {})
        self.group = SimpleNamespace(WORLD=object())
        self._own = threading.local()
        self._barrier = threading.Barrier(count, timeout=30)
        self._slots: list[Any] = [None] * count

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Call ``function(rank)`` on every rank at once; returns what each gave."""

        def work(rank: int) -> Any:
            self._own.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with (
            patch("trainstep.ranks.dist", self),
            patch("trainstep.collectives.dist", self),
            ThreadPoolExecutor(self.count) as pool,
        ):
            return list(pool.map(work, range(self.count)))

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group: Any = None) -> int:
        rank: int = self._own.rank
        return rank

    def get_world_size(self, group: Any = None) -> int:
        return self.count

    def get_backend(self, group: Any = None) -> str:
        return "threads"

    def get_backend_config(self, group: Any = None) -> str:
        return self.backends

    def all_reduce(self, tensor: Tensor, group: Any, async_op: bool) -> None:
        tensor.copy_(torch.stack(self._everyones(tensor)).sum(dim=0, dtype=tensor.dtype))

    def all_to_all_single(self, result: Tensor, tensor: Tensor, group: Any, async_op: bool) -> None:
        parts = [theirs.chunk(self.count)[self.get_rank()] for theirs in self._everyones(tensor)]
        result.copy_(torch.cat(parts))

    def all_gather_single(self, result: Tensor, tensor: Tensor, group: Any) -> None:
        result.copy_(torch.cat(self._everyones(tensor)))

    def broadcast(self, tensor: Tensor, group_src: int, group: Any) -> None:
        tensor.copy_(self._everyones(tensor)[group_src])

    def all_gather_object(self, result: list[Any], value: Any, group: Any) -> None:
        result[:] = self._everyones(value)

    def _everyones(self, value: Any) -> list[Any]:
        self._slots[self.get_rank()] = value.clone() if isinstance(value, Tensor) else value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found
