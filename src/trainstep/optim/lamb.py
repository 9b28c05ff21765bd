"""LAMB (You et al., 2020): Adam's direction with a length proportional to each tensor's norm."""

import math

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick, zeros
from trainstep.optim.multi import add_scaled_, descent, numbers, tick
from trainstep.types import Grads, Hyper, OptState, Params


def lamb(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    bias_correction: bool = True,
    max_weight_norm: float = math.inf,
    maximize: bool = False,
) -> Optimizer:
    """LAMB, for very large batches: ``p -= lr * min(|p|, max_weight_norm) / |u| * u``.

    ``u`` is Adam's direction plus ``weight_decay * p``. Source: algorithm 2 of "Large Batch Optimization
    for Deep Learning: Training BERT in 76 minutes" (arXiv:1904.00962). Gradient clipping, which some
    versions include, is a transform here (``clip_by_global_norm``).

    Args:
        lr: learning rate where the step has no schedule.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: added to the direction as ``weight_decay * p``, before its norm is taken.
        bias_correction: divide the moments by ``1 - beta ** t``; False is version 3 of the paper, and
            counts no steps.
        max_weight_norm: upper bound of the norm of ``p`` in the ratio (10 in early versions).
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``.
        Where a parameter or its direction is all zeros, the ratio is 1. Norms are float32 at least.

    Raises:
        ValueError: for values out of range.
    """
    check_range("lamb", "lr", lr, 0.0)
    check_range("lamb", "betas[0]", betas[0], 0.0, 1.0)
    check_range("lamb", "betas[1]", betas[1], 0.0, 1.0)
    check_range("lamb", "eps", eps, 0.0)
    check_range("lamb", "weight_decay", weight_decay, 0.0)
    check_range("lamb", "max_weight_norm", max_weight_norm, 0.0)

    def init(params: Params) -> OptState:
        state = {"exp_avg": zeros(params), "exp_avg_sq": zeros(params)}
        if bias_correction:
            state["step"] = counters(params, on_device=False)
        return state

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for names in groups(params, grads):
            ps = pick(params, names)
            gs = descent(ps, pick(grads, names), 0.0, maximize)
            kept = {key: pick(tensors, names) for key, tensors in state.items()}
            directions = _directions(gs, kept, hyper)
            directions = descent(ps, directions, hyper["weight_decay"])
            torch._foreach_mul_(directions, _trust_ratios(ps, directions, max_weight_norm))
            add_scaled_(ps, directions, -hyper["lr"])

    hyper = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
    }
    return Optimizer("lamb", init, kernel, hyper)


def _directions(grads: list[Tensor], state: dict[str, list[Tensor]], hyper: Hyper) -> list[Tensor]:
    beta1, beta2, eps = numbers(hyper, "beta1", "beta2", "eps")
    first, second = state["exp_avg"], state["exp_avg_sq"]
    torch._foreach_mul_(first, beta1)
    torch._foreach_add_(first, grads, alpha=1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
    roots = list(torch._foreach_sqrt(second))
    if "step" not in state:
        torch._foreach_add_(roots, eps)
        return list(torch._foreach_div(first, roots))
    steps = tick(state["step"])
    torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(roots, [1 - beta1**step for step in steps])
    return list(torch._foreach_div(first, roots))


def _trust_ratios(
    params: list[Tensor], directions: list[Tensor], max_weight_norm: float
) -> list[Tensor]:
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    weights = torch.stack(list(torch._foreach_norm(params, 2, dtype=dtype)))
    lengths = torch.stack(list(torch._foreach_norm(directions, 2, dtype=dtype)))
    both = (weights != 0) & (lengths != 0)
    ratios = torch.where(both, weights.clamp(max=max_weight_norm) / lengths, 1.0)
    return list(ratios.unbind())
