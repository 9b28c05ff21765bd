"""Data parallelism: every process has the whole model, and gradients are averaged over the processes."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainstep as ts
from trainer.distributed import agree
from trainer.distributed.ranks import Ranks
from trainer.distributed.reduce import broadcast_, mean_
from trainer.distributed.windows import Windows
from trainer.engine import LocalEngine
from trainstep import TrainState
from trainstep.types import Grads

_CPU = torch.device("cpu")


def wrap(model: nn.Module, args: Any) -> DistributedDataParallel:
    """Wrap a model with the options ``ddp_*``.

    Buffers are left to ``DDPEngine``, which sends them after an update, so that they are the same on all
    processes whenever somebody looks, rather than before the next forward pass.
    """
    options: dict[str, Any] = {}
    unused = args.ddp_find_unused_parameters
    if unused is None:  # a static graph tells by itself; recomputed layers cannot be searched
        library = hasattr(model, "save_pretrained")
        recomputed = library and getattr(model, "is_gradient_checkpointing", False)
        unused = not (recomputed or args.ddp_static_graph)
    if args.ddp_bucket_cap_mb is not None:
        options["bucket_cap_mb"] = args.ddp_bucket_cap_mb
    if {parameter.device for parameter in model.parameters()} == {args.device} != {_CPU}:
        options["device_ids"] = [args.device]
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    newer = "forward_sync_buffers" in parameters
    options["forward_sync_buffers" if newer else "broadcast_buffers"] = False
    return DistributedDataParallel(
        model,
        find_unused_parameters=unused,
        static_graph=bool(args.ddp_static_graph),
        **options,
    )


def find(model: Any) -> DistributedDataParallel | None:
    """Return the data-parallel wrapper around a model, looking into ``torch.compile``; None if none."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
    return model


class DDPEngine(LocalEngine):
    """Gradients of all processes' micro-batches, averaged while the backward pass goes on.

    Args:
        trainer: whose ``training_step`` makes the gradients of this process.
        state: the train state.
        windows: knows how many samples the other processes have.
        ranks: the processes.

    In an update in which some process has fewer samples than others (at the end of an epoch), gradients
    are weighted by samples, so that the result is that of all samples as one batch; they are then sent
    after the backward pass. A loss that is divided by the number of items needs no weights.
    """

    def __init__(self, trainer: Any, state: TrainState, windows: Windows, ranks: Ranks) -> None:
        super().__init__(trainer, state)
        self._windows, self._ranks = windows, ranks
        args = trainer.args
        accumulation = args.accelerator_config.gradient_accumulation_kwargs or {}
        self._sync_each = bool(accumulation.get("sync_each_batch", False))
        self._send_buffers = args.ddp_broadcast_buffers is not False
        # Whoever judges an update by its loss must see the same on all processes.
        self._joint_loss = joint_loss(args)
        self._checked = False
        # PyTorch learns a static graph from the first backward pass, which it must send.
        self._learning = bool(args.ddp_static_graph)

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run this process's micro-batches; yields its share of the loss so far, after each."""
        wrapper = find(self._trainer.model_wrapped)
        overlapped = self._windows.even and wrapper is not None
        if self._learning and wrapper is not None and not overlapped:
            self._unwrap(wrapper)
            wrapper = None
        weights = None if self._windows.even else self._weights(items)
        total, grads = self._zero(), Sum()
        for number, batch in enumerate(batches):
            last = number == window - 1
            if batch is not None:
                # The wrapper sends gradients in the last backward pass, or not at all.
                sync = overlapped and (last or self._sync_each or self._learning)
                quiet = nullcontext() if sync or wrapper is None else wrapper.no_sync()
                share = self._one(batch, items, window, key, number, quiet)
                weight = 1.0 if weights is None else weights[number]
                total = total + share * (weight / self._ranks.size)
                if not overlapped:
                    grads.add(self._taken(), weight)
            if last:
                if overlapped:
                    self._learning = False
                else:
                    self._average(grads.values)
                    self._forget(wrapper)
                self._finish()
                if self._joint_loss:
                    dist.all_reduce(total)
            yield total

    def _one(
        self,
        batch: Any,
        items: Any,
        window: int,
        key: Any,
        number: int,
        quiet: AbstractContextManager[None],
    ) -> Tensor:
        trainer, ranks = self._trainer, self._ranks
        # Divided by the items of all processes, and then by their number in the mean of gradients.
        shared = trainer.args.average_tokens_across_devices
        trainer._loss_factor = ranks.size if shared else 1
        place = number * ranks.size + ranks.rank
        try:
            with quiet, ts.rng.seeded(key.fold_in(place), self._devices):
                return self.backward(batch, items, window)
        finally:
            trainer._loss_factor = 1

    def _weights(self, items: Any) -> list[float]:
        """Return what this process's gradients of each micro-batch count in the mean over processes."""
        sizes, ranks = self._windows.sizes, self._ranks
        if not self._trainer._divides_by_items(items):
            return [ranks.size * each[ranks.rank] / max(sum(each), 1) for each in sizes]
        if self._trainer.args.average_tokens_across_devices:
            return [1.0] * len(sizes)
        busy = sum(any(each[rank] for each in sizes) for rank in range(ranks.size))
        return [ranks.size / max(busy, 1)] * len(sizes)

    def _taken(self) -> Grads:
        grads = {n: p.grad for n, p in self._parameters if p.grad is not None}
        self.drop()
        return grads

    def _average(self, grads: Grads) -> None:
        """Put the mean over the processes into the parameters' ``.grad``."""
        spread(dict(self._parameters), grads, self._ranks, fill=0.0)
        mean_([p.grad for _, p in self._parameters if p.grad is not None], self._ranks)

    def _unwrap(self, wrapper: DistributedDataParallel) -> None:
        """Train without a wrapper, which would take what is not sent for the static graph."""
        wrapper.reducer._remove_autograd_hooks()
        self._trainer.model_wrapped = self._trainer.model

    def _forget(self, wrapper: DistributedDataParallel | None) -> None:
        """Let a wrapper forget what it noted of parameters that were used, but not sent by it."""
        if self._learning:
            self._trainer.model_wrapped = self._trainer._wrap_model(self._trainer.model)
        elif wrapper is not None:
            wrapper.reducer._reset_state()

    def _finish(self) -> None:
        if self._send_buffers and self._kept:
            broadcast_(self.buffers_of_module())
        if not self._checked:
            self._checked = True
            self._check()

    def buffers_of_module(self) -> list[Tensor]:
        """Return what the module has as buffers now, without frozen parameters."""
        return [buffer for _, buffer in self._module.named_buffers()]

    def _check(self) -> None:
        """Raise RuntimeError if gradients were not averaged; looked at once, in the first update."""
        grads = [p.grad for _, p in self._parameters if p.grad is not None]
        norms = torch._foreach_norm(grads) if grads else []
        sums = [float(norm) for norm in norms]
        told = agree.gather(self._ranks, sums)
        if any(repr(other) != repr(told[0]) for other in told):
            raise RuntimeError(
                "gradients differ between the processes after the backward pass. training_step and "
                "compute_loss must call the model that they are given, not self.model: only the former "
                "exchanges gradients."
            )

    def _zero(self) -> Any:
        return torch.zeros((), dtype=torch.float32, device=self._ranks.device)


class Sum:
    """Gradients added up with weights."""

    def __init__(self) -> None:
        self.values: Grads = {}

    def add(self, grads: Grads, weight: float) -> None:
        """Add gradients, which may be overwritten."""
        with torch.no_grad():
            if weight != 1:
                torch._foreach_mul_(list(grads.values()), weight)
            for name, grad in grads.items():
                if name in self.values:
                    self.values[name] += grad
                else:
                    self.values[name] = grad


def spread(parameters: dict[str, nn.Parameter], grads: Grads, ranks: Ranks, *, fill: float) -> None:
    """Set the ``.grad`` of parameters that have one on any process, filled where this has none."""
    names = list(parameters)
    present = agree.any_of(ranks, [name in grads for name in names])
    for name, some in zip(names, present, strict=True):
        if some:
            own = grads.get(name)
            parameter = parameters[name]
            parameter.grad = torch.full_like(parameter, fill) if own is None else own


def joint_loss(args: Any) -> bool:
    """Tell whether the loss of every update is needed on all processes, and not only in logs."""
    judged = args.on_nonfinite != "ignore" or args.fp16
    return bool(judged or args.log_digest_steps)
