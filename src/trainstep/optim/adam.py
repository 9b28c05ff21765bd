"""Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019), with the bits of ``torch.optim``."""

from typing import Any

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick, zeros
from trainstep.types import Grads, Hyper, OptState, Params


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    amsgrad: bool = False,
    maximize: bool = False,
    fused: bool = True,
) -> Optimizer:
    """AdamW: Adam with weight decay applied to the parameters, not to the gradients.

    Args:
        lr: learning rate where the step has no schedule.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; each update first scales parameters by ``1 - lr * weight_decay``.
        amsgrad: divide by the largest second moment so far (Reddi et al., 2018).
        maximize: ascend instead of descend.
        fused: use PyTorch's fused kernel, with the bits of ``torch.optim.AdamW(fused=True)``; False
            uses multi-tensor operations, with the bits of ``torch.optim.AdamW(foreach=True)``.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``.

    Raises:
        ValueError: for values out of range.
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, maximize, fused, decoupled=True)


def adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    amsgrad: bool = False,
    maximize: bool = False,
    fused: bool = True,
) -> Optimizer:
    """Adam; ``weight_decay`` is an L2 term added to the gradients. Arguments as for ``adamw``."""
    return _adam("adam", lr, betas, eps, weight_decay, amsgrad, maximize, fused, decoupled=False)


def _adam(
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    fused: bool,
    *,
    decoupled: bool,
) -> Optimizer:
    check_range(name, "lr", lr, 0.0)
    check_range(name, "betas[0]", betas[0], 0.0, 1.0)
    check_range(name, "betas[1]", betas[1], 0.0, 1.0)
    check_range(name, "eps", eps, 0.0)
    check_range(name, "weight_decay", weight_decay, 0.0)

    def init(params: Params) -> OptState:
        state = {
            "step": counters(params, on_device=fused),
            "exp_avg": zeros(params),
            "exp_avg_sq": zeros(params),
        }
        if amsgrad:
            state["max_exp_avg_sq"] = zeros(params)
        return state

    update = _fused if fused else _foreach

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for names in groups(params, grads):
            update(
                pick(params, names),
                pick(grads, names),
                {key: pick(tensors, names) for key, tensors in state.items()},
                hyper,
                decoupled,
                maximize,
            )

    hyper = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
    }
    return Optimizer(name, init, kernel, hyper, capturable=fused)


def _fused(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    hyper: Hyper,
    decoupled: bool,
    maximize: bool,
) -> None:
    torch._foreach_add_(state["step"], 1)
    operation = torch._fused_adamw_ if decoupled else torch._fused_adam_
    peak = state.get("max_exp_avg_sq", [])
    operation(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        peak,
        state["step"],
        amsgrad=bool(peak),
        maximize=maximize,
        **hyper,
    )


def _foreach(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    hyper: Hyper,
    decoupled: bool,
    maximize: bool,
) -> None:
    lr, beta1, beta2, eps, weight_decay = (
        float(hyper[k]) for k in ("lr", "beta1", "beta2", "eps", "weight_decay")
    )
    first, second = state["exp_avg"], state["exp_avg_sq"]
    if maximize:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_add_(state["step"], 1)
    if weight_decay != 0:
        if decoupled:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        else:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    if "max_exp_avg_sq" in state:
        torch._foreach_maximum_(state["max_exp_avg_sq"], second)
        second = state["max_exp_avg_sq"]
    steps: list[Any] = [step.item() for step in state["step"]]  # on the CPU, see counters()
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominator, eps)
    sizes = [(lr / (1 - beta1**step)) * -1 for step in steps]
    torch._foreach_addcdiv_(params, first, denominator, sizes)
