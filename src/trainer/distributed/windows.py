"""The micro-batches of an update, taken by all processes alike.

Batch ``k`` of an epoch is the one that process ``k % w`` gets as its number ``k // w``; side by side they
are one micro-batch of all processes. At the end of an epoch some of them may be short or missing (None):
such a process takes part in the update all the same, with the weight of what it has.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field
from torch import Tensor

from trainer.data.sampler import GlobalBatchSampler
from trainer.distributed import agree
from trainer.distributed.ranks import Ranks
from trainer.evaluation.nested import batch_length

_END: Any = object()


@define(eq=False)
class Windows:
    """Takes the micro-batches of updates; what ``Run.take`` is with several processes.

    Args:
        trainer: whose ``get_batch_samples`` is asked.
        loader: where the batches come from.
        ranks: the processes.
        in_tree: put the micro-batches into the order in which a tree adds them up.

    Attributes:
        sizes: of each micro-batch of the last window, in their own order, the samples on every process.
    """

    trainer: Any
    loader: Any
    ranks: Ranks
    in_tree: bool = False
    sizes: list[list[int]] = field(factory=list, init=False)
    _counts: bool | None = field(default=None, init=False)

    def __call__(self, batches: Iterator[Any]) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next update, and what their loss is divided by.

        ``get_batch_samples`` is asked only while there is a batch: overrides may count on it.
        """
        self.sizes = []
        args = self.trainer.args
        if self.ranks.many or self.in_tree:
            batches = self._watched(batches)
        if (first := next(batches, _END)) is _END:
            return [], None
        window, items = self.trainer.get_batch_samples(
            chain((first,), batches), args.gradient_accumulation_steps, args.device
        )
        if self.in_tree:
            window = [window[place] for place in tree_order(range(len(window)))]
        return window, items

    def share_items(self, items: Tensor | int | None) -> Tensor | int | None:
        """Return the sum over the processes of what losses are divided by; waits for no device.

        Where one process counts items all do, those without a batch none of them.
        """
        if not self.ranks.many:
            return items
        if self._counts is None:
            self._counts = agree.any_of(self.ranks, [items is not None])[0]
        if not self._counts:
            return None
        device = self.ranks.device
        shared = torch.as_tensor(0 if items is None else items, dtype=torch.int64)
        # A copy, since the count may be the user's; without waiting for the device.
        shared = shared.to(device, non_blocking=True, copy=True)
        dist.all_reduce(shared)
        return shared

    @property
    def even(self) -> bool:
        """Whether every process has as many samples in every micro-batch of the last window."""
        return all(size == sizes[0] for sizes in self.sizes for size in sizes)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches, None where only other processes have one, and note their sizes."""
        sampler = self._sampler()
        first = self.trainer._run.batch
        while True:
            batch = next(batches, _END)
            if sampler is not None or not self.ranks.many:
                if batch is _END:
                    return
                place = first + len(self.sizes)
                sizes = [batch_length(batch)] if sampler is None else _planned(sampler, place)
            else:
                some = 0 if batch is _END else 1
                size = batch_length(batch) if some and batch is not None else 0
                told = agree.gather_numbers(self.ranks, [some, size])
                if not any(some for some, _ in told):
                    return
                batch, sizes = (batch if some else None), [size for _, size in told]
            self.sizes.append(sizes)
            yield batch

    def _sampler(self) -> GlobalBatchSampler | None:
        """Return what knows the sizes of all processes' batches without asking them; None if nothing."""
        sampler = getattr(self.loader, "batch_sampler", None)
        known = isinstance(sampler, GlobalBatchSampler) and sampler.num_replicas == self.ranks.size
        return sampler if known else None


def tree_order(places: Any) -> list[int]:
    """Return places in the order in which a tree of even and odd ones comes to them."""
    if len(places) <= 1:
        return list(places)
    return tree_order(places[::2]) + tree_order(places[1::2])


def _planned(sampler: GlobalBatchSampler, number: int) -> list[int]:
    """Return the samples that each process has in its batch of that number."""
    size, left = sampler.batch_size, len(sampler.order) - number * sampler.global_batch_size
    return [min(size, max(0, left - rank * size)) for rank in range(sampler.num_replicas)]
