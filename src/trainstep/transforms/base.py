"""The contract of a gradient transformation, and what a step tells it."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.rng import Key
from trainstep.types import Grads, Params


@define(eq=False)
class Context:
    """What a step tells its transforms besides the gradients.

    Attributes:
        step: updates done before this one.
        key: randomness of this update's transforms.
        owned: the gradients belong to the step and may be overwritten to save a copy.
        donated: the same for the transform's own state.
        weight: how many items the gradients are a mean over; a number or a zero-dimensional tensor.
        norm: the global norm of ``measured``, if somebody computed it already.
        measured: the gradients that ``norm`` belongs to.
    """

    step: int = 0
    key: Key = field(factory=lambda: Key(0))
    owned: bool = False
    norm: Tensor | None = None
    measured: Grads | None = None
    donated: bool = field(default=False, kw_only=True)
    weight: Tensor | float = field(default=1.0, kw_only=True)

    def global_norm(self, grads: Grads) -> Tensor:
        """Return the global norm of ``grads``, computed once however many ask for it."""
        if self.measured is not grads or self.norm is None:
            self.norm = tree.global_norm(grads.values())
            self.measured = grads
        return self.norm


Update = Callable[[Grads, Any, Params, Context], tuple[Grads, Any]]


def no_state(params: Params) -> Any:
    """Return ``()``: the state of a transform that keeps nothing."""
    return ()


@frozen(eq=False)
class Transform:
    """A gradient transformation.

    Attributes:
        name: for messages and for paths in checkpoints.
        init: ``init(params) -> state``, a pytree of tensors; ``()`` if it keeps nothing.
        fn: ``fn(grads, state, params, context) -> (grads, state)``. Returning no gradients at all,
            ``{}``, holds the update: later transforms and the optimizer are not run on this call.
        period: after how many calls the host does the same again. 1: what it does is the same on
            every call, so a recorded step can hold it; None: every call differs.
    """

    name: str
    fn: Update = field(repr=False)
    init: Callable[[Params], Any] = field(default=no_state, repr=False)
    period: int | None = field(default=1, kw_only=True)

    def update(
        self, grads: Grads, state: Any, params: Params, context: Context | None = None
    ) -> tuple[Grads, Any]:
        """Return the transformed gradients and the next state; pure unless ``context.owned``."""
        with torch.no_grad():
            return self.fn(grads, state, params, context or Context())


def own(grads: Grads, context: Context) -> Grads:
    """Return gradients that may be overwritten: copies, unless they are the step's own.

    The dict is always a new one, so that a norm measured before is not taken for the norm of these.
    """
    return dict(grads) if context.owned else {n: g.clone() for n, g in grads.items()}


def groups(grads: Grads) -> list[list[str]]:
    """Split names into runs of one device and dtype, which multi-tensor kernels need."""
    runs: dict[Any, list[str]] = {}
    for name, grad in grads.items():
        runs.setdefault((grad.device, grad.dtype), []).append(name)
    return list(runs.values())
