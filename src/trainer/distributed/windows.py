"""The micro-batches of an update, taken by all processes alike.

Batch ``k`` of an epoch is the one that process ``k % w`` gets as its number ``k // w``; side by side they
are one micro-batch of all processes. At the end of an epoch some of them may be short or missing (None):
such a process takes part in the update all the same, with the weight of what it has.
"""

from collections.abc import Iterator
from itertools import islice
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
class _Ahead:
    """An epoch's batches; whether there is another one can be found out before it is taken."""

    batches: Iterator[Any]
    given: int = field(default=0, init=False)
    _waiting: list[Any] = field(factory=list, init=False)

    def more(self) -> bool:
        if not self._waiting:
            self._waiting.extend(islice(self.batches, 1))
        return bool(self._waiting)

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> Any:
        batch = self._waiting.pop() if self._waiting else next(self.batches)
        self.given += 1
        return batch


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
    _epoch: Iterator[Any] | None = field(default=None, init=False)
    _ahead: _Ahead = field(init=False)
    _read: list[list[int]] = field(factory=list, init=False)
    _held: int = field(default=0, init=False)

    def __call__(self, batches: Iterator[Any]) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next update, and what their loss is divided by.

        ``get_batch_samples`` is asked only while there is a batch, or while it holds some that it has not
        returned: overrides may count on it.

        Args:
            batches: those of an epoch, the same iterator until its end.
        """
        if self._epoch is not batches:
            self._begin(batches)
        if not self._ahead.more() and self._held <= 0:
            self._epoch = None
            return [], None
        args, given = self.trainer.args, self._ahead.given
        window, items = self.trainer.get_batch_samples(
            self._ahead, args.gradient_accumulation_steps, args.device
        )
        taken = self._ahead.given - given
        self._held += taken - len(window)
        self.sizes, self._read = self._read[:taken], self._read[taken:]
        if self.in_tree:
            window = [window[place] for place in tree_order(range(len(window)))]
        return window, items

    def _begin(self, batches: Iterator[Any]) -> None:
        self._epoch, self._held, self._read = batches, 0, []
        if self.ranks.many or self.in_tree:
            batches = self._watched(batches)
        self._ahead = _Ahead(batches)

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
        place = self.trainer._run.batch
        while True:
            batch = next(batches, _END)
            if sampler is not None or not self.ranks.many:
                if batch is _END:
                    return
                sizes = [batch_length(batch)] if sampler is None else _planned(sampler, place)
            else:
                some = 0 if batch is _END else 1
                size = batch_length(batch) if some and batch is not None else 0
                told = agree.gather_numbers(self.ranks, [some, size])
                if not any(some for some, _ in told):
                    return
                batch, sizes = (batch if some else None), [size for _, size in told]
            place += 1
            self._read.append(sizes)
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
