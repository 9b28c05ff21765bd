"""Fused optimizer kernels as arithmetic, which a compiler can fuse with what comes before them."""

from typing import Any

import torch
from torch import Tensor


def _adam_(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    peaks: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Do what ``torch._fused_adam_`` and ``torch._fused_adamw_`` do; see ``trainstep.optim.adam``.

    With m, v the moments and t the step:

        p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    """
    assert grad_scale is found_inf is None, "steps scale and skip by themselves"
    if maximize:
        grads = [-grad for grad in grads]
    if weight_decay and decoupled:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    elif weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    if amsgrad:
        torch._foreach_maximum_(peaks, second)
        second = peaks
    for param, m, v, step in zip(params, first, second, steps, strict=True):
        size = lr / (1 - beta1**step)
        denominator = v.sqrt() / (1 - beta2**step).sqrt() + eps
        param.sub_((size * (m / denominator)).to(param.dtype))


def _table() -> dict[Any, Any]:
    def decomposition(decoupled: bool) -> Any:
        return lambda *args, **kwargs: _adam_(*args, **kwargs, decoupled=decoupled)

    aten = torch.ops.aten
    kernels = ((aten._fused_adam_, False), (aten._fused_adamw_, True))
    return {
        getattr(kernel, overload): decomposition(decoupled)
        for kernel, decoupled in kernels
        for overload in ("default", "tensor_lr")
    }


ADAM = _table()
