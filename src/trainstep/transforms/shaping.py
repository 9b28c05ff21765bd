"""Transformations that change gradients in other ways than limiting them."""

import math
from typing import Any

import torch
from torch import Tensor

from trainstep import rng
from trainstep.transforms.base import Context, Transform, groups, own
from trainstep.types import Grads, Params


def add_noise(eta: float = 0.01, gamma: float = 0.55, *, seed: int = 0) -> Transform:
    """Add Gaussian noise that fades out (Neelakantan et al., 2015).

    The variance at step ``t`` (from 0) is ``eta / (1 + t) ** gamma``. The noise is a function of the
    step's key: the same on every repetition, and no global generator moves.

    Args:
        eta: variance at the first step.
        gamma: how fast it fades; 0 keeps it.
        seed: gives several ``add_noise`` in one step noise of their own.

    Raises:
        ValueError: if ``eta`` is negative.
    """
    if not eta >= 0:
        raise ValueError(f"transforms.add_noise: eta must be at least 0: {eta}")

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        deviation = math.sqrt(eta / (1 + context.step) ** gamma)
        noisy = own(grads, context)
        with rng.seeded(context.key.fold_in(seed), {g.device for g in grads.values()}):
            for grad in noisy.values():
                grad.add_(torch.randn_like(grad), alpha=deviation)
        return noisy, state

    return Transform("add_noise", update, period=None)


def centralize() -> Transform:
    """Subtract from each row of a gradient its mean (gradient centralization; Yong et al., 2020).

    A row is ``grad[i]``, the gradient of one output. Tensors with fewer than two axes stay as they are.
    """

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        centred = own(grads, context)
        for grad in centred.values():
            if grad.ndim > 1:
                grad.sub_(grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True))
        return centred, state

    return Transform("centralize", update)


def zero_nonfinite() -> Transform:
    """Replace entries that are NaN or infinite by 0 and keep the others.

    Put it before transforms that measure norms. ``make_step(on_nonfinite="skip")`` drops the whole
    update instead, and judges gradients before any transform.
    """

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        cleaned = own(grads, context)
        for grad in cleaned.values():
            torch.nan_to_num_(grad, nan=0.0, posinf=0.0, neginf=0.0)
        return cleaned, state

    return Transform("zero_nonfinite", update)


def scale_by_trust_ratio(coefficient: float = 1.0, eps: float = 0.0) -> Transform:
    """Scale each gradient to the size of its parameter (LARS: You et al., 2017).

    The factor is ``coefficient * |param| / (|grad| + eps)``, and 1 where either norm is 0. Before SGD
    this is LARS; LAMB, which scales Adam's update rather than the gradient, is ``optim.lamb``.

    Raises:
        ValueError: if ``coefficient`` is not above 0 or ``eps`` is negative.
    """
    if not coefficient > 0:
        raise ValueError(
            f"transforms.scale_by_trust_ratio: coefficient must be above 0: {coefficient}"
        )
    if not eps >= 0:
        raise ValueError(f"transforms.scale_by_trust_ratio: eps must be at least 0: {eps}")

    def ratios(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        sizes = torch.stack(list(torch._foreach_norm(params)))
        norms = torch.stack(list(torch._foreach_norm(grads)))
        factors = coefficient * sizes / (norms + eps)
        measurable = (sizes != 0) & (norms != 0)
        return list(torch.where(measurable, factors, 1.0).unbind())

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        scaled = own(grads, context)
        for names in groups(scaled):
            group = [scaled[n] for n in names]
            torch._foreach_mul_(group, ratios(group, [params[n] for n in names]))
        return scaled, state

    return Transform("scale_by_trust_ratio", update)
