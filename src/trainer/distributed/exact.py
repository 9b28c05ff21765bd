"""Gradients of micro-batches added in a tree, so that the sum has the same bits on 1, 2, 4 ... processes.

Micro-batch ``j`` of process ``r`` of ``w`` is number ``i = j * w + r`` of the update. It draws its
randomness from the update's key with ``i`` folded in, and its gradient is that of its own loss, whoever
computes it. The sum is

    tree(numbers) = tree(even ones) + tree(odd ones)

over all numbers that there are. A loss that is a mean counts with its number of samples, and the sum is
divided once, by all samples; one that is divided by the update's items is only added.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer.distributed.ddp import spread
from trainer.distributed.ranks import Ranks
from trainer.distributed.reduce import check_power_of_two, sum_in_tree_
from trainer.distributed.windows import Windows, tree_order
from trainer.engine import LocalEngine
from trainstep import TrainState
from trainstep.types import Grads

# What changes no number that it is added to; +0.0 would turn -0.0 into +0.0.
_NOTHING = -0.0

Part = tuple[Grads, Tensor]


class ExactEngine(LocalEngine):
    """Adds up gradients in the exact order. It holds about ``log2(micro-batches) + 1`` sets of them.

    Args:
        trainer: whose ``training_step`` makes the gradients of this process.
        state: the train state.
        windows: gives the micro-batches in the tree's order, and knows their sizes.
        ranks: the processes.

    Raises:
        ValueError: if there is no tree over so many processes, or the model has running statistics, which
            depend on who sees which batch.
    """

    def __init__(self, trainer: Any, state: TrainState, windows: Windows, ranks: Ranks) -> None:
        check_power_of_two(ranks.size)
        super().__init__(trainer, state)
        self._windows, self._ranks = windows, ranks
        if ranks.many and not trainer.args.average_tokens_across_devices:
            raise ValueError(
                "exact_reduction needs average_tokens_across_devices=True: otherwise each process divides "
                "by items of its own, and the sum depends on how many processes there are."
            )
        refuse_statistics(self._module)

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run this process's micro-batches in the tree's order; yields its loss so far after each."""
        by_items = self._trainer._divides_by_items(items)
        before = self._versions()
        tree = self._tree(tree_order(range(window)), iter(batches), items, key, by_items)
        so_far: Any = None
        for _ in range(1, window):
            share = next(tree)
            so_far = share if so_far is None else (so_far if share is None else so_far + share)
            yield so_far
        total = self._together(_drain(tree))
        if not by_items:
            samples = sum(map(sum, self._windows.sizes)) / self._unit
            grads = [p.grad for _, p in self._parameters if p.grad is not None]
            if samples != 1:
                torch._foreach_div_(grads, samples)
                total = total / samples
        self._check_buffers(before)
        yield total

    @property
    def _unit(self) -> int:
        """What weights are counted in: samples of a full micro-batch, so that its weight is 1."""
        return max(max(sizes) for sizes in self._windows.sizes) or 1

    def _tree(
        self, places: list[int], batches: Iterator[Any], items: Any, key: Any, by_items: bool
    ) -> Generator[Tensor | None, None, Part | None]:
        """Return the sum over places, yielding each loss; places are in the order of the batches."""
        if len(places) == 1:
            batch = next(batches)
            if batch is None:
                yield None
                return None
            size = self._windows.sizes[places[0]][self._ranks.rank]
            weight = 1.0 if by_items else size / self._unit
            part = self._leaf(places[0], batch, items, key, weight)
            yield part[1]
            return part
        half = (len(places) + 1) // 2
        left = yield from self._tree(places[:half], batches, items, key, by_items)
        right = yield from self._tree(places[half:], batches, items, key, by_items)
        return _add(left, right)

    def _leaf(self, place: int, batch: Any, items: Any, key: Any, weight: float) -> Part:
        number = place * self._ranks.size + self._ranks.rank
        with ts.rng.seeded(key.fold_in(number), self._devices):
            loss = self.backward(batch, items, 1).float()  # the same type on every process
        grads = {n: p.grad for n, p in self._parameters if p.grad is not None}
        self.drop()
        if weight != 1:
            torch._foreach_mul_(list(grads.values()), weight)
            loss = loss * weight
        return grads, loss

    def _together(self, mine: Part | None) -> Tensor:
        """Put the sums over all processes into the parameters' ``.grad``; return that of the loss."""
        grads: Grads = {}
        loss: Any = None
        if mine is not None:
            grads, loss = mine
        if not self._ranks.many:
            for name, parameter in self._parameters:
                parameter.grad = grads.get(name)
            return loss
        spread(dict(self._parameters), grads, self._ranks, fill=_NOTHING)
        total = torch.full((), _NOTHING, device=self._ranks.device) if loss is None else loss
        sums = [p.grad for _, p in self._parameters if p.grad is not None]
        sum_in_tree_([*sums, total])
        return total

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {n: (id(b), b._version) for n, b in self._module.named_buffers()}

    def _check_buffers(self, before: dict[str, tuple[int, int]]) -> None:
        changed = [name for name, now in self._versions().items() if now != before.get(name)]
        if changed:
            raise ValueError(_statistics(changed))


def refuse_statistics(module: torch.nn.Module) -> None:
    """Raise ValueError if a module keeps running statistics of its batches."""
    found = [
        name
        for name, part in module.named_modules()
        if isinstance(getattr(part, "running_mean", None), Tensor) and part.training
    ]
    if found:
        raise ValueError(_statistics(found))


def _statistics(names: list[str]) -> str:
    return (
        "exact_reduction gives the same bits on any number of processes, but buffers that change in the "
        f"forward pass depend on who sees which batch: {', '.join(names[:4])}. Use layers without "
        "running statistics (GroupNorm, LayerNorm, track_running_stats=False), or set "
        "exact_reduction=False."
    )


def _add(left: Part | None, right: Part | None) -> Part | None:
    """Add the right part to the left one, whose gradients are overwritten."""
    if left is None or right is None:
        return right if left is None else left
    grads, others = left[0], right[0]
    shared = [name for name in others if name in grads]
    if shared:
        with torch.no_grad():
            torch._foreach_add_([grads[n] for n in shared], [others[n] for n in shared])
    return {**others, **grads}, left[1] + right[1]


def _drain(tree: Generator[Any, None, Part | None]) -> Part | None:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(tree)
        except StopIteration as end:
            result: Part | None = end.value
            return result
