"""Sums over micro-batches, not divided yet, and the binary tree in which they can be added.

Floating-point addition is not associative, so sums have the same bits only if they are added in the
same order. The tree's order does not depend on who adds: micro-batches with even index form one half,
those with odd index the other, and so on down. A strided share ``r, r + w, r + 2 w, ...`` (w a power of
two) is then a subtree, which one of ``w`` ranks can add up on its own.
"""

from collections.abc import Callable, Sequence

import torch
from attrs import define
from torch import Tensor

from trainstep.losses import Loss
from trainstep.scaling import unscale_
from trainstep.types import Buffers, Grads


@define(eq=False)
class Sums:
    """What micro-batches add up to.

    Attributes:
        grads: sums of gradients by parameter name, divided by ``unit`` and multiplied by ``scale``.
        total: sum of the loss, divided by ``unit``.
        weight: sum of the weights, divided by ``unit``; a number or a zero-dimensional tensor.
        buffers: the module's buffers after the last micro-batch.
        aux: sums of the loss's further sums.
        unit: what one stands for: the weight of the first micro-batch, or 1.
        scale: the loss scale in the gradients, a zero-dimensional tensor; None for 1.
    """

    grads: Grads
    total: Tensor
    weight: Tensor | float
    buffers: Buffers
    aux: dict[str, Tensor]
    unit: float = 1.0
    scale: Tensor | None = None

    def add_(self, other: "Sums") -> "Sums":
        """Add ``other`` to this, overwriting these gradients; returns this.

        Raises:
            ValueError: if the two are in different units, and so cannot be added without rounding.
        """
        if self.unit != other.unit:
            raise ValueError(
                f"Sums.add_: cannot add sums in units of {other.unit} to sums in units of {self.unit}; "
                'make both with order="tree", which uses 1'
            )
        shared = [name for name in other.grads if name in self.grads]
        if shared:
            mine, others = ([grads[n] for n in shared] for grads in (self.grads, other.grads))
            with torch.no_grad():
                torch._foreach_add_(mine, others)
        self.grads = {**other.grads, **self.grads}
        self.total = self.total + other.total
        self.weight = self.weight + other.weight
        self.aux = {name: self.aux[name] + extra for name, extra in other.aux.items()}
        self.buffers = other.buffers
        return self

    def mean(self) -> tuple[Loss, Grads]:
        """Divide once and return ``(loss, grads)``; overwrites these gradients."""
        grads = list(self.grads.values())
        if not isinstance(self.weight, Tensor) and self.weight == 1:  # a single mean, say
            if self.scale is not None:
                unscale_(grads, self.scale)
            mean = Loss.from_mean(self.total, self.unit, buffers=self.buffers, aux=self.aux)
            return mean, self.grads
        with torch.no_grad():
            torch._foreach_div_(grads, self.weight)
        if self.scale is not None:
            unscale_(grads, self.scale)
        loss = Loss(
            self.total * self.unit,
            self.weight * self.unit,
            self.buffers,
            self.aux,
            mean=self.total / self.weight,
        )
        return loss, self.grads


def add_in_tree(indices: Sequence[int], leaf: Callable[[int], Sums]) -> Sums:
    """Add up ``leaf(i)`` in the binary tree of even and odd positions.

    ``add_in_tree(s) == add_in_tree(s[::2]) + add_in_tree(s[1::2])``, bit for bit. Leaves are evaluated
    from left to right, so no more than about ``log2(len(indices)) + 1`` sums exist at a time.
    """
    if len(indices) == 1:
        return leaf(indices[0])
    return add_in_tree(indices[::2], leaf).add_(add_in_tree(indices[1::2], leaf))
