"""Tensors added up over processes: as fast as the backend can, or in an order that is always the same.

**The exact order.** Floating-point addition is not associative, so sums have the same bits only if they are
added in the same order. Micro-batches are numbered over all processes; those with even numbers form one
half of a binary tree, those with odd numbers the other, and so on down. With ``w`` processes, a power of
two, number ``i`` is computed by process ``i % w``, whose numbers are a subtree; what is left is the top of
the tree, over the bits of the rank: ``((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))`` for eight.

``trainstep.collectives.tree_sum`` computes it; each process sends ``2 (w - 1) / w`` times the size of the
gradients, as much as a ring all-reduce.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trainstep as ts
from trainer.distributed.ranks import Ranks

BUCKET = 32 * 2**20
"""Bytes that are sent at once; so much memory is needed besides the tensors, and as much to receive."""


def mean_(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace tensors by their means over the processes."""

    def reduce(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat.div_(ranks.size)

    _apply(tensors, reduce)


def broadcast_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace tensors by those of one process."""
    _apply(tensors, lambda flat: dist.broadcast(flat, src=source))


def sum_in_tree_(tensors: Iterable[Tensor]) -> None:
    """Replace floating-point tensors by their sums over the processes, in the exact order.

    Where a process has nothing to add, it gives ``-0.0``, which changes no number it is added to.
    """
    _apply(tensors, lambda flat: flat.copy_(ts.collectives.tree_sum(flat)))


def check_power_of_two(size: int) -> None:
    """Raise ValueError unless a tree over so many processes exists."""
    if size & (size - 1):
        raise ValueError(
            f"exact_reduction adds gradients in a binary tree, which needs 1, 2, 4, 8, ... processes; got "
            f"{size}. Launch a power of two, or set exact_reduction=False."
        )


def buckets(tensors: Iterable[Tensor], limit: int = BUCKET) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype and device, in an order that is the same on every process."""

    def kind(tensor: Tensor) -> tuple[str, str]:
        return str(tensor.dtype), tensor.device.type

    for _, alike in groupby(sorted(tensors, key=kind), key=kind):
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _apply(tensors: Iterable[Tensor], act: Callable[[Tensor], Any]) -> None:
    """Let ``act`` change tensors in place, many of them at once as one flat tensor."""
    with torch.no_grad():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            act(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
