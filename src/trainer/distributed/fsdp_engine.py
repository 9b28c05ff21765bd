"""Gradients of a distributed model: each process gets its part of their mean over all."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import modeling
from trainer.distributed import agree
from trainer.distributed.ddp import DDPEngine
from trainer.distributed.ranks import Ranks
from trainer.distributed.windows import Windows
from trainer.evaluation.nested import batch_length
from trainstep import TrainState


class FSDPEngine(DDPEngine):
    """Gradients averaged by ``fully_shard`` while the backward pass goes on.

    Args:
        trainer: whose ``training_step`` makes the gradients of this process.
        state: the train state, made of parts of tensors.
        windows: knows how many samples the other processes have.
        ranks: the processes.

    Every process runs every micro-batch, since gathering parameters needs all of them: one that has no
    samples left runs some that others have, which count nothing. In an update in which processes have
    different numbers of samples, losses are weighted before the backward pass, so that the result is that
    of all samples as one batch.
    """

    def __init__(self, trainer: Any, state: TrainState, windows: Windows, ranks: Ranks) -> None:
        super().__init__(trainer, state, windows, ranks)
        accumulation = trainer.args.accelerator_config.gradient_accumulation_kwargs or {}
        # Gradients that wait for the last micro-batch are whole ones: that is only done if asked for.
        self._sync_each = bool(accumulation.get("sync_each_batch", True))
        self._checked = True  # processes have different parts: there is nothing to compare
        self._devices = {*self._devices, ranks.device}
        self._root: Any = modeling.unwrap(trainer.model)

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run this process's micro-batches; yields its share of the loss so far, after each."""
        weights = None if self._windows.even else self._weights(items)
        total = self._zero()
        for number, batch in enumerate(batches):
            last = number == window - 1
            weight = 1.0 if weights is None else weights[number]
            filler = batch is None
            if self._ranks.many and not all(sizes := self._windows.sizes[number]):
                batch, weight = stand_in(self._ranks, batch, sizes), 0.0 if filler else weight
            self._announce(last=last)
            self._trainer._gradient_weight = weight
            share = self._one(batch, items, window, key, number, nullcontext())
            if not filler:
                total = total + share * (weight / self._ranks.size)
            self._check_weighted(weight)
            if last:
                self._finish()
                if self._joint_loss:
                    dist.all_reduce(total)
            yield total

    def _announce(self, *, last: bool) -> None:
        """Say before a micro-batch whether it is the last of an update."""
        self._root.set_requires_gradient_sync(last or self._sync_each)

    def _check_weighted(self, weight: float) -> None:
        left, self._trainer._gradient_weight = self._trainer._gradient_weight, 1
        if weight != 1 and left != 1:
            raise ValueError(
                "with fsdp and deepspeed, training_step must call self.accelerator.backward(loss) rather "
                "than loss.backward(): at the end of an epoch processes have different numbers of samples, "
                "and losses are weighted there. Or set dataloader_drop_last=True."
            )


def stand_in(ranks: Ranks, batch: Any, sizes: list[int]) -> Any:
    """Return the batch of this process, or of the first one that has one; all processes must call."""
    source = next(rank for rank, size in enumerate(sizes) if size)
    offer = modeling.move(batch, torch.device("cpu")) if ranks.rank == source else None
    offered = agree.gather(ranks, offer)
    return offered[source] if batch is None else batch


def evenly(ranks: Ranks, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield this process's batches, and stand-ins as long as another has some: ``(batch, is its own)``."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        size = 0 if batch is None else max(1, batch_length(batch))
        sizes = [some for (some,) in agree.gather_numbers(ranks, [size])]
        if not any(sizes):
            return
        own = batch is not None
        yield (batch if all(sizes) else stand_in(ranks, batch, sizes)), own
