"""What the processes found in an evaluation, brought together on all of them in the order of the data."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from trainer.distributed import agree
from trainer.distributed.ranks import Ranks
from trainer.evaluation.nested import map_leaves

# Tensors of all types lie behind each other in one buffer, each where any type may begin.
_ALIGNED = 16


def gathered(ranks: Ranks, parts: Iterable[Any], every: int | None) -> Iterator[Any]:
    """Yield the parts of all processes: the first one of each process by rank, then the second, ...

    Args:
        ranks: the processes.
        parts: one for each of this process's batches; None for a batch that only others have. Nested
            tuples, lists and mappings of tensors and of objects that can be pickled.
        every: bring together after that many batches; None at the end.

    Processes need not have equally many.
    """
    mine = iter(parts)
    while True:
        held = list(islice(mine, every))
        over = every is None or len(held) < every
        told = gather_nested(ranks, (held, over))
        for place in range(max(len(theirs) for theirs, _ in told)):
            for theirs, _ in told:
                if place < len(theirs) and theirs[place] is not None:
                    yield theirs[place]
        if all(done for _, done in told):
            return


def gather_nested(ranks: Ranks, value: Any) -> list[Any]:
    """Return a nested value of every process, by rank.

    Everything but the tensors is pickled; those travel as they are, in one operation.
    """
    tensors: list[Tensor] = []
    skeleton = _take_out(value, tensors)
    on_host = all(tensor.device.type == "cpu" for tensor in tensors)
    sizes = [_room(tensor) for tensor in tensors]
    told = agree.gather(ranks, (skeleton, sum(sizes), on_host))
    longest = max(length for _, length, _ in told)
    host = all(everything for _, _, everything in told)
    device = torch.device("cpu") if host else ranks.device
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    start = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        mine[start : start + flat.numel()] = flat.to(device)
        start += size
    buffers = [torch.empty_like(mine) for _ in range(ranks.size)]
    if longest:
        dist.all_gather(buffers, mine, group=agree.host_group(ranks) if host else None)
    return [_Filler(buffer).fill(part) for buffer, (part, _, _) in zip(buffers, told, strict=True)]


@frozen
class _Slot:
    """Stands for a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """Return a nested value with slots for its tensors, which are appended to ``tensors``."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _Slot(tuple(leaf.shape), leaf.dtype)

    return map_leaves(take, value)


class _Filler:
    """Puts tensors from a buffer into their slots, in order."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._start = buffer, 0

    def fill(self, value: Any) -> Any:
        return map_leaves(lambda leaf: self._next(leaf) if isinstance(leaf, _Slot) else leaf, value)

    def _next(self, slot: _Slot) -> Tensor:
        size = slot.dtype.itemsize
        for length in slot.shape:
            size *= length
        flat = self._buffer[self._start : self._start + size].view(slot.dtype)
        self._start += -(-size // _ALIGNED) * _ALIGNED
        return flat.reshape(slot.shape)
