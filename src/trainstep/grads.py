"""Gradients of a loss, and their accumulation over micro-batches.

Gradients are collected on private leaves that share storage with the parameters. ``backward`` adds
micro-batch after micro-batch into one buffer per parameter, as the plain loop does, so accumulation
needs no second copy of the gradients.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainstep import rng
from trainstep.losses import Loss, ModuleLoss
from trainstep.model import held
from trainstep.rng import Key
from trainstep.types import Buffers, Grads, LossFn, Params


def value_and_grad(loss_fn: LossFn) -> Callable[..., tuple[Loss, Grads]]:
    """Turn a loss function into one that returns ``(loss, grads)``.

    The gradients are those of the mean, ``total / weight``. Parameters that the loss does not reach
    have no entry, as ``.grad`` stays None in PyTorch, so optimizers leave them alone.

    Raises:
        ValueError: if the loss depends on no parameter.
    """

    def value_and_grad_fn(
        params: Params, buffers: Buffers, batch: Any, key: Key
    ) -> tuple[Loss, Grads]:
        return accumulate(loss_fn, params, buffers, [batch], key)

    return value_and_grad_fn


def accumulate(
    loss_fn: LossFn,
    params: Params,
    buffers: Buffers,
    microbatches: Iterable[Any],
    key: Key,
    *,
    donate_buffers: bool = False,
) -> tuple[Loss, Grads]:
    """Return the loss and gradients of several micro-batches as if they were one batch.

    Sums and weights are added in the order given and divided once. Micro-batch ``i`` draws its
    randomness from ``key.fold_in(i)``, and sees the buffers that micro-batch ``i - 1`` left.

    Args:
        loss_fn: the pure loss.
        params: trainable tensors by name.
        buffers: the module's other tensors by name.
        microbatches: batches of any sizes; consumed lazily, so a generator keeps one in memory.
        key: the key of this step.
        donate_buffers: let the loss write into ``buffers``.

    Raises:
        ValueError: if there is no micro-batch, or the loss depends on no parameter.
    """
    total = Accumulator(loss_fn, params, buffers, key, donate_buffers=donate_buffers)
    for batch in microbatches:
        total.add(batch)
    return total.finish()


@define(eq=False)
class Accumulator:
    """Running sums over micro-batches. ``add`` them one by one, then ``finish``."""

    loss_fn: LossFn
    params: Params
    buffers: Buffers
    key: Key
    donate_buffers: bool = field(default=False, kw_only=True)
    count: int = field(default=0, init=False)
    _leaves: Params = field(factory=dict, init=False)
    _devices: set[torch.device] = field(factory=set, init=False)
    _unit: float = field(default=1.0, init=False)
    _total: Any = field(default=None, init=False)
    _weight: Any = field(default=None, init=False)
    _aux: dict[str, Tensor] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._leaves = {n: p.detach().requires_grad_() for n, p in self.params.items()}
        self._devices = {p.device for p in self.params.values()}

    def add(self, batch: Any) -> Loss:
        """Run one micro-batch forward and backward; returns its loss, detached."""
        key = self.key.fold_in(self.count)
        # A loss that can reuse buffers may do so once they are ours: from the second call on.
        options: dict[str, Any] = {}
        if isinstance(self.loss_fn, ModuleLoss) and (self.donate_buffers or self.count > 0):
            options["donate_buffers"] = True
        with held(), rng.seeded(key, self._devices):
            loss = self.loss_fn(self._leaves, self.buffers, batch, key, **options)
            root, factor = loss.root
            if not root.requires_grad:
                raise ValueError(_no_gradient(self.params))
            if self.count == 0:
                self._unit = factor
            ratio = factor / self._unit
            (root if ratio == 1 else root * ratio).backward(inputs=list(self._leaves.values()))
        return self._record(loss, ratio)

    def finish(self) -> tuple[Loss, Grads]:
        """Divide once and return ``(loss, grads)``; the loss carries the summed weight."""
        if self.count == 0:
            raise ValueError("accumulate: no micro-batches; the batch is empty")
        grads: Grads = {}
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                grads[name] = leaf.grad
                leaf.grad = None
        if isinstance(self._weight, Tensor) or self._weight != 1:
            with torch.no_grad():
                torch._foreach_div_(list(grads.values()), self._weight)
        weight = self._weight * self._unit
        loss = Loss(
            self._total * self._unit,
            weight,
            self.buffers,
            self._aux,
            mean=self._total / self._weight,
        )
        return loss, grads

    def _record(self, loss: Loss, ratio: float) -> Loss:
        # Sums are kept in units of the first loss's factor: equal means then count exactly 1 each.
        value = loss.root[0].detach()
        if ratio != 1:
            value = value * ratio
        weight = loss.weight.detach() if isinstance(loss.weight, Tensor) else loss.weight
        share = weight if self._unit == 1 else weight / self._unit
        aux = {name: extra.detach() for name, extra in loss.aux.items()}
        if self.count == 0:
            self._total, self._weight, self._aux = value, share, aux
        else:
            self._total = self._total + value
            self._weight = self._weight + share
            self._aux = {name: self._aux[name] + extra for name, extra in aux.items()}
        if loss.buffers is not None:
            self.buffers = loss.buffers
        self.count += 1
        return loss


def _no_gradient(params: Params) -> str:
    names = ", ".join(list(params)[:4]) or "there are none"
    return (
        "value_and_grad: the loss does not depend on any trainable parameter "
        f"(parameters: {names}), so there is nothing to differentiate. Check that the loss is "
        "computed from the output of call(...), that no torch.no_grad(), .detach() or .item() cuts "
        "the graph, and that at least one parameter has requires_grad=True."
    )
