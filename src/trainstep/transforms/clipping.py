"""Limits on gradients: by value, by norm of everything, of a parameter, of a unit."""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.transforms.base import Context, Transform, own
from trainstep.types import Grads, Params


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients down so that their joint Euclidean norm is at most ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, with the bits of
    ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al., 2013). No host sync.

    Raises:
        ValueError: if ``max_norm`` is not above 0.
    """
    _positive("clip_by_global_norm", "max_norm", max_norm)

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        factor = torch.clamp(max_norm / (context.global_norm(grads) + 1e-6), max=1.0)
        clipped = own(grads, context)
        for group in tree.by_device_and_dtype(list(clipped.values())):
            torch._foreach_mul_(group, factor.to(group[0].device))
        return clipped, state

    return Transform("clip_by_global_norm", update)


def clip_by_value(limit: float) -> Transform:
    """Clip every entry of every gradient to ``[-limit, limit]``. NaNs stay.

    Raises:
        ValueError: if ``limit`` is not above 0.
    """
    _positive("clip_by_value", "limit", limit)

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        clipped = own(grads, context)
        for group in tree.by_device_and_dtype(list(clipped.values())):
            torch._foreach_clamp_min_(group, -limit)
            torch._foreach_clamp_max_(group, limit)
        return clipped, state

    return Transform("clip_by_value", update)


def clip_by_parameter_norm(max_norm: float) -> Transform:
    """Scale each parameter's gradient down so that its own Euclidean norm is at most ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``: the bits of ``clip_grad_norm_`` called with each
    parameter alone.

    Raises:
        ValueError: if ``max_norm`` is not above 0.
    """
    _positive("clip_by_parameter_norm", "max_norm", max_norm)

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        clipped = own(grads, context)
        for group in tree.by_device_and_dtype(list(clipped.values())):
            norms = torch.stack(list(torch._foreach_norm(group)))
            factors = torch.clamp(max_norm / (norms + 1e-6), max=1.0)
            torch._foreach_mul_(group, list(factors.unbind()))
        return clipped, state

    return Transform("clip_by_parameter_norm", update)


def adaptive_clip(clipping: float = 0.01, eps: float = 1e-3) -> Transform:
    """Adaptive gradient clipping (AGC; Brock et al., 2021, equation 3).

    The gradient of each unit is scaled down where its norm is above ``clipping`` times the norm of the
    unit's weights. A unit is a row, ``weight[i]``, of a tensor with two or more axes (PyTorch keeps
    outputs first), and the whole of a smaller one.

    Args:
        clipping: largest ratio of the norms.
        eps: least norm that weights are taken to have, so that those at zero can move.

    Raises:
        ValueError: if ``clipping`` or ``eps`` is not above 0.
    """
    _positive("adaptive_clip", "clipping", clipping)
    _positive("adaptive_clip", "eps", eps)

    def clip(grad: Tensor, param: Tensor) -> Tensor:
        limit = _unit_norm(param).clamp_min(eps) * clipping
        norm = _unit_norm(grad)
        # Below the least normal number a ratio of norms means nothing; a norm of 0 is never clipped.
        factor = limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return torch.where(norm > limit, grad * factor, grad)

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        return {name: clip(grad, params[name]) for name, grad in grads.items()}, state

    return Transform("adaptive_clip", update)


def _unit_norm(tensor: Tensor) -> Tensor:
    """Return the norms of rows, shape (n, 1, ..., 1); of the whole if there are no rows."""
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


def _positive(name: str, what: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"transforms.{name}: {what} must be above 0: {value}")
