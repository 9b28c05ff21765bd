"""Gradients of a loss, and their accumulation over micro-batches.

Gradients are collected on private leaves that share storage with the parameters. ``backward`` adds
micro-batch after micro-batch into one buffer per parameter, as the plain loop does, so accumulation
needs no second copy of the gradients.
"""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, Literal

import torch
from attrs import define, field
from torch import Tensor

from trainstep import rng
from trainstep.losses import Loss, ModuleLoss
from trainstep.model import held
from trainstep.rng import Key
from trainstep.sums import Sums, add_in_tree
from trainstep.types import Buffers, Grads, LossFn, Params

Order = Literal["sequential", "tree"]
"""How gradients of micro-batches are added; see ``sum_gradients``."""


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
    order: Order = "sequential",
    scale: Tensor | None = None,
    donate_buffers: bool = False,
) -> tuple[Loss, Grads]:
    """Return the loss and gradients of several micro-batches as if they were one batch.

    Sums and weights are added in the given order and divided once: ``sum_gradients(...).mean()``, whose
    arguments these are.

    Raises:
        ValueError: if there is no micro-batch, or the loss depends on no parameter.
    """
    return sum_gradients(
        loss_fn,
        params,
        buffers,
        microbatches,
        key,
        order=order,
        scale=scale,
        donate_buffers=donate_buffers,
    ).mean()


def sum_gradients(
    loss_fn: LossFn,
    params: Params,
    buffers: Buffers,
    microbatches: Iterable[Any],
    key: Key,
    *,
    order: Order = "sequential",
    positions: Sequence[int] | None = None,
    scale: Tensor | None = None,
    donate_buffers: bool = False,
) -> Sums:
    """Add up losses, gradients and weights of micro-batches.

    Micro-batch ``i`` draws its randomness from ``key.fold_in(i)``. Two orders of addition:

    - ``"sequential"``: ``((g0 + g1) + g2) + ...``, in units of the first weight. Micro-batches are
      consumed lazily, so a generator keeps one in memory, and there is one set of gradients.
    - ``"tree"``: ``tree(all) = tree(even positions) + tree(odd positions)``, in units of 1, so that shares
      of several ranks add up to the same bits as the whole. Micro-batches are evaluated from left
      to right in the tree (0, 4, 2, 6, 1, 5, 3, 7), all of them are held in memory, and about
      ``log2(n) + 1`` sets of gradients.

    Each micro-batch sees the buffers that the one evaluated before it left.

    Args:
        loss_fn: the pure loss.
        params: trainable tensors by name.
        buffers: the module's other tensors by name.
        microbatches: batches of any sizes.
        key: the key of this step.
        order: ``"sequential"`` or ``"tree"``.
        positions: the index ``i`` of each micro-batch, if these are a share of more: rank ``r`` of ``w``
            gives ``range(r, n, w)``. None counts from 0.
        scale: multiply the loss by this before the backward pass; ``Sums.mean`` takes it out again.
        donate_buffers: let the loss write into ``buffers``.

    Raises:
        ValueError: if there is no micro-batch, or not as many as positions, or the loss depends on no
            parameter, or for an unknown order.
    """
    check_order("accumulate", order)
    unit = 1.0 if order == "tree" else None
    total = Accumulator(
        loss_fn, params, buffers, key, donate_buffers=donate_buffers, scale=scale, unit=unit
    )
    if order == "sequential":
        for index, batch in _numbered(microbatches, positions):
            total.add(batch, index)
        return total.take()
    numbered = list(_numbered(microbatches, positions))
    if not numbered:
        raise ValueError(_EMPTY)

    def leaf(place: int) -> Sums:
        index, batch = numbered[place]
        total.add(batch, index)
        return total.take()

    return add_in_tree(range(len(numbered)), leaf)


def check_order(where: str, order: str) -> None:
    """Raise ValueError unless ``order`` is one that gradients can be added in."""
    if order not in ("sequential", "tree"):
        raise ValueError(f'{where}: order must be "sequential" or "tree"; got {order!r}')


@define(eq=False)
class Accumulator:
    """Running sums over micro-batches. ``add`` them one by one, then ``finish``."""

    loss_fn: LossFn
    params: Params
    buffers: Buffers
    key: Key
    donate_buffers: bool = field(default=False, kw_only=True)
    scale: Tensor | None = field(default=None, kw_only=True)
    unit: float | None = field(default=None, kw_only=True)
    count: int = field(default=0, init=False)
    _leaves: Params = field(factory=dict, init=False)
    _devices: set[torch.device] = field(factory=set, init=False)
    _empty: bool = field(default=True, init=False)
    _unit: float = field(default=1.0, init=False)
    _total: Any = field(default=None, init=False)
    _weight: Any = field(default=None, init=False)
    _aux: dict[str, Tensor] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._leaves = {n: p.detach().requires_grad_() for n, p in self.params.items()}
        self._devices = {p.device for p in self.params.values()}

    def add(self, batch: Any, index: int | None = None) -> Loss:
        """Run one micro-batch forward and backward; returns its loss, detached.

        Its key is the step's with ``index`` folded in; None counts the micro-batches added so far.
        """
        key = self.key.fold_in(self.count if index is None else index)
        # A loss that can reuse buffers may do so once they are ours: from the second call on.
        options: dict[str, Any] = {}
        if isinstance(self.loss_fn, ModuleLoss) and (self.donate_buffers or self.count > 0):
            options["donate_buffers"] = True
        with held(), rng.seeded(key, self._devices):
            loss = self.loss_fn(self._leaves, self.buffers, batch, key, **options)
            root, factor = loss.root
            if not root.requires_grad:
                raise ValueError(_no_gradient(self.params))
            if self._empty:
                self._unit = factor if self.unit is None else self.unit
            ratio = factor / self._unit
            if ratio != 1:
                root = root * ratio
            if self.scale is not None:
                root = root * self.scale.to(root.device)
            root.backward(inputs=list(self._leaves.values()))
        # The graph may be that of other tensors, such as the module's own parameters.
        if all(leaf.grad is None for leaf in self._leaves.values()):
            raise ValueError(_no_gradient(self.params))
        return self._record(loss, ratio)

    def take(self) -> Sums:
        """Return the sums since the last ``take`` and start over; buffers and ``count`` go on."""
        if self._empty:
            raise ValueError(_EMPTY)
        grads: Grads = {}
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                grads[name] = leaf.grad
                leaf.grad = None
        self._empty = True
        return Sums(
            grads, self._total, self._weight, self.buffers, self._aux, self._unit, self.scale
        )

    def finish(self) -> tuple[Loss, Grads]:
        """Divide once and return ``(loss, grads)``; the loss carries the summed weight."""
        return self.take().mean()

    def _record(self, loss: Loss, ratio: float) -> Loss:
        # Sums are kept in units of the first loss's factor: equal means then count exactly 1 each.
        value = loss.root[0].detach()
        if ratio != 1:
            value = value * ratio
        weight = loss.weight.detach() if isinstance(loss.weight, Tensor) else loss.weight
        share = weight if self._unit == 1 else weight / self._unit
        aux = {name: extra.detach() for name, extra in loss.aux.items()}
        if self._empty:
            self._total, self._weight, self._aux = value, share, aux
        else:
            self._total = self._total + value
            self._weight = self._weight + share
            self._aux = {name: self._aux[name] + extra for name, extra in aux.items()}
        if loss.buffers is not None:
            self.buffers = loss.buffers
        self._empty = False
        self.count += 1
        return loss


def _numbered(
    microbatches: Iterable[Any], positions: Sequence[int] | None
) -> Iterable[tuple[int, Any]]:
    if positions is None:
        return enumerate(microbatches)
    if isinstance(microbatches, Sized) and len(microbatches) != len(positions):
        raise ValueError(
            f"sum_gradients: {len(positions)} positions for {len(microbatches)} micro-batches; give one "
            "position for each"
        )
    return zip(positions, microbatches, strict=True)


_EMPTY = "accumulate: no micro-batches; the batch is empty"


def _no_gradient(params: Params) -> str:
    names = ", ".join(list(params)[:4]) or "there are none"
    return (
        "value_and_grad: the loss does not depend on any trainable parameter "
        f"(parameters: {names}), so there is nothing to differentiate. Check that the loss is "
        "computed from the output of call(...), not of the module itself, whose own parameters are not "
        "those that train; that no torch.no_grad(), .detach() or .item() cuts the graph; and that at "
        "least one parameter has requires_grad=True."
    )
