"""Stochastic gradient descent with momentum, with the bits of ``torch.optim.SGD(foreach=True)``.

In float32 and float64 these are also the bits of ``foreach=False``; in bfloat16 on the CPU PyTorch's two
differ from each other.
"""

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick
from trainstep.types import Grads, Hyper, OptState, Params


def sgd(
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """SGD: ``v = momentum * v + (1 - dampening) * g``; ``p = p - lr * v``.

    Args:
        lr: learning rate where the step has no schedule.
        momentum: 0 keeps no state at all.
        dampening: not applied to the first gradient, as in PyTorch.
        weight_decay: L2 term added to the gradients.
        nesterov: step along ``g + momentum * v`` (Sutskever et al., 2013).
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``momentum``, ``weight_decay``.

    Raises:
        ValueError: for values out of range, or Nesterov without momentum or with dampening.
    """
    check_range("sgd", "lr", lr, 0.0)
    check_range("sgd", "momentum", momentum, 0.0)
    check_range("sgd", "weight_decay", weight_decay, 0.0)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("optim.sgd: nesterov needs momentum above 0 and dampening 0")

    def init(params: Params) -> OptState:
        state: OptState = {}
        if momentum != 0:
            # -0.0 is the exact additive identity: -0.0 + g has the bits of g, as PyTorch's first step.
            state["momentum_buffer"] = {n: torch.full_like(p, -0.0) for n, p in params.items()}
            if dampening != 0:
                state["step"] = counters(params, on_device=False)
        return state

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for names in groups(params, grads):
            ps, gs = pick(params, names), pick(grads, names)
            if maximize:
                gs = list(torch._foreach_neg(gs))
            decay = hyper["weight_decay"]
            if not (isinstance(decay, float) and decay == 0):
                gs = list(torch._foreach_add(gs, ps, alpha=float(decay)))
            mass = hyper["momentum"]
            # As in PyTorch, buffers stay as they are for as long as the momentum is set to 0.
            if momentum != 0 and not (isinstance(mass, float) and mass == 0):
                gs = _with_momentum(names, gs, state, mass, dampening, nesterov)
            _descend(ps, gs, hyper["lr"])

    return Optimizer(
        "sgd", init, kernel, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    )


def _with_momentum(
    names: list[str],
    grads: list[Tensor],
    state: OptState,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> list[Tensor]:
    buffers = pick(state["momentum_buffer"], names)
    torch._foreach_mul_(buffers, momentum)
    if dampening == 0:
        torch._foreach_add_(buffers, grads)
    else:
        steps = pick(state["step"], names)
        for buffer, grad, step in zip(buffers, grads, steps, strict=True):
            buffer.add_(grad, alpha=1 - dampening if step.item() else 1)
        torch._foreach_add_(steps, 1)
    return list(torch._foreach_add(grads, buffers, alpha=momentum)) if nesterov else buffers


def _descend(params: list[Tensor], grads: list[Tensor], lr: float | Tensor) -> None:
    if isinstance(lr, Tensor):  # kernels take no tensor as alpha
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
