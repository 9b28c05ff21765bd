"""Which worker this is, and whether a dataset asks for that."""

from __future__ import annotations

from typing import Any

from torch.utils.data import get_worker_info
from torch.utils.data._utils import worker as torch_worker


class WatchedWorker:
    """What ``get_worker_info`` returns in a process whose dataset is watched.

    Attributes:
        watching: Whether code of the dataset runs, rather than of a collator, say.
        asked: Whether the dataset has read ``id`` or ``num_workers``.
        dataset: The dataset, as this worker has it.
    """

    def __init__(self, info: Any, dataset: Any) -> None:
        self.watching = self.asked = False
        self.dataset = dataset
        self._info = info

    @property
    def id(self) -> int:
        self.asked |= self.watching
        return self._info.id

    @property
    def num_workers(self) -> int:
        self.asked |= self.watching
        return self._info.num_workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._info, name)


def watch(dataset: Any) -> WatchedWorker:
    """In a worker process, let it be noticed whether ``dataset`` asks which worker it is in."""
    watched = WatchedWorker(_info(), dataset)
    torch_worker._worker_info = watched  # type: ignore[assignment]
    return watched


def worker_and_workers() -> tuple[int, int]:
    """Return the number of this worker and how many there are; (0, 1) in the main process."""
    info = _info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _info() -> Any:
    info: Any = get_worker_info()
    return info._info if isinstance(info, WatchedWorker) else info
