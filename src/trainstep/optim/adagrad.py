"""Adagrad (Duchi, Hazan and Singer, 2011), with the bits of ``torch.optim.Adagrad``."""

import torch

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick
from trainstep.optim.multi import add_quotient_, descent, numbers, tick
from trainstep.types import Grads, Hyper, OptState, Params


def adagrad(
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adagrad: divide gradients by the root of the sum of all their squares.

    Source: "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 12.

    Args:
        lr: learning rate where the step has no schedule.
        lr_decay: the t-th update uses ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 term added to the gradients.
        initial_accumulator_value: what the sum of squares starts from.
        eps: added to the root.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``weight_decay``, ``eps``. Its bits are those of
        ``torch.optim.Adagrad(foreach=True)``. Without ``lr_decay`` it counts no steps.

    Raises:
        ValueError: for values out of range.
    """
    check_range("adagrad", "lr", lr, 0.0)
    check_range("adagrad", "lr_decay", lr_decay, 0.0)
    check_range("adagrad", "weight_decay", weight_decay, 0.0)
    check_range("adagrad", "initial_accumulator_value", initial_accumulator_value, 0.0)
    check_range("adagrad", "eps", eps, 0.0)

    def init(params: Params) -> OptState:
        start = {
            n: torch.full_like(p, initial_accumulator_value, memory_format=torch.preserve_format)
            for n, p in params.items()
        }
        counts = {"step": counters(params, on_device=False)} if lr_decay != 0 else {}
        return {"sum": start, **counts}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        lr, (floor,) = hyper["lr"], numbers(hyper, "eps")
        for names in groups(params, grads):
            ps = pick(params, names)
            given = pick(grads, names)
            gs = descent(ps, given, hyper["weight_decay"], maximize)
            sums = pick(state["sum"], names)
            torch._foreach_addcmul_(sums, gs, gs, value=1)
            roots = list(torch._foreach_sqrt(sums))
            torch._foreach_add_(roots, floor)
            # Scaled before the division, as PyTorch does: the other order rounds differently.
            if isinstance(lr, torch.Tensor) and lr_decay == 0:
                add_quotient_(ps, gs, roots, -lr)
            else:
                steps = tick(pick(state["step"], names)) if lr_decay != 0 else [1.0] * len(names)
                rates = [-float(lr) / (1 + (step - 1) * lr_decay) for step in steps]
                if gs is given:
                    gs = list(torch._foreach_mul(gs, rates))
                else:  # as PyTorch does: in bfloat16 on the CPU the two round rates differently
                    torch._foreach_mul_(gs, rates)
                torch._foreach_addcdiv_(ps, gs, roots)

    return Optimizer("adagrad", init, kernel, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
