"""RMSprop (Hinton, 2012; centered: Graves, 2013), with the bits of ``torch.optim.RMSprop``."""

import torch

from trainstep.optim.base import Optimizer, check_range, groups, pick, zeros
from trainstep.optim.multi import add_quotient_, add_scaled_, descent, numbers
from trainstep.types import Grads, Hyper, OptState, Params


def rmsprop(
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """RMSprop: divide gradients by the root of the running mean of their squares.

    Source: lecture 6e of Hinton's "Neural Networks for Machine Learning"; the centered form is from
    Graves, "Generating Sequences With Recurrent Neural Networks" (arXiv:1308.0850).

    Args:
        lr: learning rate where the step has no schedule.
        alpha: decay rate of the mean of squares.
        eps: added to the root.
        weight_decay: L2 term added to the gradients.
        momentum: heavy-ball momentum on the divided gradients; 0 keeps no buffer.
        centered: divide by the standard deviation: subtract the square of the running mean.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``alpha``, ``eps``, ``weight_decay``, ``momentum``.

    Raises:
        ValueError: for values out of range.
    """
    check_range("rmsprop", "lr", lr, 0.0)
    check_range("rmsprop", "alpha", alpha, 0.0)
    check_range("rmsprop", "eps", eps, 0.0)
    check_range("rmsprop", "weight_decay", weight_decay, 0.0)
    check_range("rmsprop", "momentum", momentum, 0.0)

    def init(params: Params) -> OptState:
        state = {"square_avg": zeros(params)}
        if momentum > 0:
            state["momentum_buffer"] = zeros(params)
        if centered:
            state["grad_avg"] = zeros(params)
        return state

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        rate, floor, mass = numbers(hyper, "alpha", "eps", "momentum")
        for names in groups(params, grads):
            ps = pick(params, names)
            gs = descent(ps, pick(grads, names), hyper["weight_decay"], maximize)
            squares = pick(state["square_avg"], names)
            torch._foreach_mul_(squares, rate)
            torch._foreach_addcmul_(squares, gs, gs, value=1 - rate)
            if centered:
                means = pick(state["grad_avg"], names)
                torch._foreach_lerp_(means, gs, 1 - rate)
                roots = list(torch._foreach_addcmul(squares, means, means, value=-1))
                torch._foreach_sqrt_(roots)
            else:
                roots = list(torch._foreach_sqrt(squares))
            torch._foreach_add_(roots, floor)
            if momentum > 0 and mass > 0:  # buffers stay as they are for as long as it is set to 0
                buffers = pick(state["momentum_buffer"], names)
                torch._foreach_mul_(buffers, mass)
                torch._foreach_addcdiv_(buffers, gs, roots)
                add_scaled_(ps, buffers, -hyper["lr"])
            else:
                add_quotient_(ps, gs, roots, -hyper["lr"])

    hyper = {
        "lr": lr,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
    }
    return Optimizer("rmsprop", init, kernel, hyper)
