"""Iterable datasets of every kind that loaders have to go on with, and ways to read them."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from support.shell import make_args
from trainer.data.feed import Feed
from trainer.data.loader import make_loader

N = 22


def drawn() -> float:
    """A sum of draws from the three global generators."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002


class Numbers(IterableDataset):
    """The numbers 0..n-1 with noise, the same in every worker; ``reads`` tells which were read."""

    def __init__(self, n: int = N) -> None:
        self.n = n
        self.reads: list[int] = []

    def give(self, i: int) -> Any:
        self.reads.append(i)
        return (i, drawn())

    def __iter__(self) -> Iterator[Any]:
        return map(self.give, range(self.n))


class Sized(Numbers):
    """Tells its length."""

    def __len__(self) -> int:
        return self.n


class Saved(Numbers):
    """Has a state; counts its epochs itself, and gives other numbers in each."""

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.done, self.pass_ = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.done < self.n:
            self.done += 1
            yield self.give(self.done - 1 + 100 * self.pass_)
        self.done, self.pass_ = 0, self.pass_ + 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "pass": (self.pass_,)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, (self.pass_,) = state["done"], state["pass"]


class Epochs(Saved):
    """Has a state, and is told its epochs."""

    def set_epoch(self, epoch: int) -> None:
        self.pass_ = epoch


class Divided(Numbers):
    """Divides its numbers among workers; has no state."""

    def mine(self) -> list[int]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return list(range(worker, self.n, workers))

    def __iter__(self) -> Iterator[Any]:
        return map(self.give, self.mine())


class DividedSaved(Divided):
    """Divides its numbers among workers; has a state."""

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        mine = self.mine()
        while self.done < len(mine):
            self.done += 1
            yield self.give(mine[self.done - 1])
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": np.int64(self.done), "as a tensor": torch.tensor([self.done])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["as a tensor"].tolist() == [state["done"]]
        self.done = int(state["done"])


class ItsIterator:
    """Keeps the state of `Iterated`."""

    def __init__(self, dataset: Numbers) -> None:
        self.dataset = dataset
        self.done = 0

    def __iter__(self) -> "ItsIterator":
        return self

    def __next__(self) -> Any:
        if self.done == self.dataset.n:
            raise StopIteration
        self.done += 1
        return self.dataset.give(self.done - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class Iterated(Numbers):
    """Has an iterator with a state."""

    def __iter__(self) -> Iterator[Any]:
        return ItsIterator(self)


class Itself(Saved):
    """Is its own iterator, and begins anew when it is asked for one."""

    def __iter__(self) -> Iterator[Any]:
        self.done = 0
        return self

    def __next__(self) -> Any:
        if self.done == self.n:
            self.pass_ += 1
            raise StopIteration
        self.done += 1
        return self.give(self.done - 1 + 100 * self.pass_)


KINDS: list[Callable[[], Numbers]] = [
    *[Numbers, Sized, Saved, Epochs, Divided, DividedSaved, Iterated, Itself]
]
"""Datasets of every kind."""


def noisy(rows: list[Any]) -> Any:
    """A random collator: the numbers, their noise, and more noise."""
    return [i for i, _ in rows], [noise for _, noise in rows], drawn()


def numbers(batches: Any) -> list[list[int]]:
    """The numbers in batches that ``noisy`` made."""
    return [batch[0] for batch in batches]


def feed(folder: Path, dataset: Any, size: int = 3, **changes: Any) -> Feed:
    """A feed of ``dataset`` in batches of ``size``."""
    args = make_args(folder, **changes)
    return Feed(make_loader(dataset, noisy, args, batch_size=size, order=None))


def kept(feed: Feed, epoch: int) -> Any:
    """The state of a feed as a checkpoint gives it back."""
    return json.loads(json.dumps(feed.state(epoch), allow_nan=False))
