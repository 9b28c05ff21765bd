"""Which process of a run this is, and what binds the processes together."""

import atexit
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from attrs import field, frozen

from trainer.distributed.groups import take_down


@frozen
class Ranks:
    """The processes that share a training.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
        timeout: after how long an operation that needs all of them fails.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    timeout: timedelta = timedelta(minutes=30)
    device: torch.device = field(factory=lambda: torch.device("cpu"))

    @property
    def many(self) -> bool:
        """Whether there is more than this process."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this is process 0, which decides where only one may."""
        return self.rank == 0


def ranks_of(args: Any) -> Ranks:
    """Return the processes that ``args`` belong to, joining their group if that was not done yet."""
    size = args.world_size
    if size > 1:
        leave_at_exit()
    return Ranks(args.process_index, size, args.ddp_timeout_delta, args.device)


def rows_of_rank(args: Any, batch_size: int) -> int:
    """Return how many rows of a batch one process takes.

    All of them, as the sizes in the arguments are those of a device; with ``split_batches`` in
    ``accelerator_config`` a batch is that of all processes, which share it.

    Raises:
        ValueError: if it cannot be shared evenly.
    """
    if not getattr(args.accelerator_config, "split_batches", False) or args.world_size == 1:
        return batch_size
    if batch_size % args.world_size:
        raise ValueError(
            f"accelerator_config: split_batches shares each batch of {batch_size} among "
            f"{args.world_size} processes, which does not divide it. Set a per-device batch size "
            f"that is a multiple of {args.world_size}, or split_batches=False."
        )
    return batch_size // args.world_size


_watched = False


def leave_at_exit() -> None:
    """Take the groups of processes down when the program ends, which PyTorch leaves to its user."""
    global _watched
    if _watched:
        return
    _watched = True
    owner = os.getpid()

    def leave() -> None:
        # After an error others may never come to the end, and NCCL would wait for them.
        failed = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if os.getpid() == owner and failed is None:
            take_down()

    atexit.register(leave)
