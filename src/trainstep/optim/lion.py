"""Lion (Chen et al., 2023): the sign of an interpolated momentum."""

import torch

from trainstep.optim.base import Optimizer, check_range, groups, pick, zeros
from trainstep.optim.multi import add_scaled_, descent, numbers, shrink_
from trainstep.types import Grads, Hyper, OptState, Params


def lion(
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Lion: ``p -= lr * sign(beta1 * m + (1 - beta1) * g)``, then ``m = beta2 * m + (1 - beta2) * g``.

    Source: "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675). The bits are those of
    the ``Lion`` of torch-optimi and of pytorch-optimizer. Every entry moves by the whole rate, so
    rates are three to ten times smaller than Adam's and weight decay larger by as much.

    Args:
        lr: learning rate where the step has no schedule.
        betas: interpolation rate of the update, decay rate of the momentum.
        weight_decay: decoupled decay; each update first scales parameters by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta1``, ``beta2``, ``weight_decay``.

    Raises:
        ValueError: for values out of range.
    """
    check_range("lion", "lr", lr, 0.0)
    check_range("lion", "betas[0]", betas[0], 0.0, 1.0)
    check_range("lion", "betas[1]", betas[1], 0.0, 1.0)
    check_range("lion", "weight_decay", weight_decay, 0.0)

    def init(params: Params) -> OptState:
        return {"exp_avg": zeros(params)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        beta1, beta2 = numbers(hyper, "beta1", "beta2")
        for names in groups(params, grads):
            ps, momenta = pick(params, names), pick(state["exp_avg"], names)
            gs = descent(ps, pick(grads, names), 0.0, maximize)
            shrink_(ps, hyper["lr"], hyper["weight_decay"])
            updates = list(torch._foreach_lerp(momenta, gs, 1 - beta1))
            torch._foreach_sign_(updates)
            torch._foreach_lerp_(momenta, gs, 1 - beta2)
            add_scaled_(ps, updates, -hyper["lr"])

    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay}
    return Optimizer("lion", init, kernel, hyper)
