"""Short messages between the processes of a run: what one of them must know of the others.

They travel over the host (gloo), so that no device is waited for. Every function here must be called
by all processes in the same order. With a single process none of them does anything.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from trainer.distributed.groups import beside
from trainer.distributed.ranks import Ranks

T = TypeVar("T")


def host_group(ranks: Ranks) -> Any:
    """Return a group that exchanges tensors on the CPU: the default one if it can, else one beside it."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else beside("messages", ranks.timeout)


def gather(ranks: Ranks, value: T) -> list[T]:
    """Return the value of every process, by rank; anything that can be pickled."""
    if not ranks.many:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value, group=host_group(ranks))
    return values


def from_first(ranks: Ranks, value: T) -> T:
    """Return the value of process 0."""
    if not ranks.many:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=host_group(ranks))
    return values[0]


def gather_numbers(ranks: Ranks, numbers: Sequence[int]) -> list[list[int]]:
    """Return the integers of every process, by rank; all give equally many."""
    if not ranks.many:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    parts = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(parts, mine, group=host_group(ranks))
    return [part.tolist() for part in parts]


def any_of(ranks: Ranks, flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on some process."""
    if not ranks.many:
        return list(flags)
    joined = torch.tensor(flags, dtype=torch.uint8, device="cpu")
    dist.all_reduce(joined, dist.ReduceOp.MAX, group=host_group(ranks))
    return [bool(flag) for flag in joined.tolist()]


def total(ranks: Ranks, numbers: Any) -> Any:
    """Return the sums of float64 numbers over all processes, the same bits on each; all give as many."""
    if not ranks.many:
        return numbers
    mine = torch.from_numpy(np.array(numbers, dtype=np.float64))
    parts = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(parts, mine, group=host_group(ranks))
    # Added by rank on every process, because the order in which gloo adds is its own affair.
    return np.sum(torch.stack(parts).numpy(), axis=0)


def together(ranks: Ranks, what: str, act: Callable[[], T], kind: type[Exception]) -> T:
    """Let every process ``act``; if one of them fails, all raise.

    Args:
        ranks: the processes.
        what: what is done, for the message.
        act: does it, without exchanging anything.
        kind: the exception that processes raise which did not fail themselves.

    Raises:
        Exception: on a process that failed, its own.
    """
    if not ranks.many:
        return act()
    error: Exception | None = None
    result: Any = None
    try:
        result = act()
    except Exception as raised:
        error = raised
    outcomes = gather(ranks, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(outcomes) if text is not None]
    if failed:
        raise kind("; ".join(f"{what} failed on process {rank}: {text}" for rank, text in failed))
    return result
