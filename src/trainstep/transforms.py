"""Gradient transformations: what happens to gradients between the loss and the optimizer.

Each is a pair of functions, as in optax: ``init(params) -> state`` and
``update(grads, state, params, context) -> (grads, state)``. ``make_step`` applies them in the order given.
"""

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
        norm: the global norm of ``measured``, if somebody computed it already.
        measured: the gradients that ``norm`` belongs to.
    """

    step: int = 0
    key: Key = field(factory=lambda: Key(0))
    owned: bool = False
    norm: Tensor | None = None
    measured: Grads | None = None

    def global_norm(self, grads: Grads) -> Tensor:
        """Return the global norm of ``grads``, computed once however many ask for it."""
        if self.measured is not grads or self.norm is None:
            self.norm = tree.global_norm(grads.values())
            self.measured = grads
        return self.norm


Update = Callable[[Grads, Any, Params, Context], tuple[Grads, Any]]


def _no_state(params: Params) -> Any:
    return ()


@frozen(eq=False)
class Transform:
    """A gradient transformation.

    Attributes:
        name: for messages and for paths in checkpoints.
        init: ``init(params) -> state``, a pytree of tensors; ``()`` if it keeps nothing.
        fn: ``fn(grads, state, params, context) -> (grads, state)``.
    """

    name: str
    fn: Update = field(repr=False)
    init: Callable[[Params], Any] = field(default=_no_state, repr=False)

    def update(
        self, grads: Grads, state: Any, params: Params, context: Context | None = None
    ) -> tuple[Grads, Any]:
        """Return the transformed gradients and the next state; pure unless ``context.owned``."""
        with torch.no_grad():
            return self.fn(grads, state, params, context or Context())


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients down so that their joint Euclidean norm is at most ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, with the bits of
    ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al., 2013). No host sync.

    Raises:
        ValueError: if ``max_norm`` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"transforms.clip_by_global_norm: max_norm must be above 0: {max_norm}")

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        factor = torch.clamp(max_norm / (context.global_norm(grads) + 1e-6), max=1.0)
        return _scale(grads, factor, context.owned), state

    return Transform("clip_by_global_norm", update)


def _scale(grads: Grads, factor: Tensor, in_place: bool) -> Grads:
    if not in_place:
        grads = {n: g.clone() for n, g in grads.items()}
    for group in tree.by_device_and_dtype(list(grads.values())):
        torch._foreach_mul_(group, factor.to(group[0].device))
    # A new dict, so that a norm measured before is not taken for the norm of these.
    return dict(grads)
