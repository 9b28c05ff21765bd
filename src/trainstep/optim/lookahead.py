"""Lookahead (Zhang et al., 2019): slow parameters that follow the fast ones every ``k`` updates."""

import torch

from trainstep import tree
from trainstep.optim.base import Optimizer, counters, groups, pick
from trainstep.optim.multi import tick
from trainstep.types import Grads, Hyper, OptState, Params


def lookahead(optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> Optimizer:
    """Every ``k`` updates, move slow parameters by ``alpha`` towards the fast ones and restart from there.

    Source: "Lookahead Optimizer: k steps forward, 1 step back" (arXiv:1907.08610). The bits are those of
    the ``Lookahead`` of pytorch-optimizer without momentum pull-back.

    Args:
        optimizer: makes the fast updates; its moments go on across restarts.
        k: updates between restarts, counted per parameter.
        alpha: how far slow parameters move; in [0, 1].

    Raises:
        ValueError: for values out of range.
    """
    if k < 1 or int(k) != k:
        raise ValueError(f"optim.lookahead: k must be an int of at least 1, got {k}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"optim.lookahead: alpha must be in [0, 1], got {alpha}")

    def init(params: Params) -> OptState:
        return {
            "step": counters(params, on_device=False),
            "slow": tree.clone(params),
            "optimizer": optimizer.init(params),
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        optimizer.kernel(params, grads, state["optimizer"], hyper)
        for names in groups(params, grads):
            steps = tick(pick(state["step"], names))
            due = [n for n, step in zip(names, steps, strict=True) if step >= k]
            if due:
                fast, slow = pick(params, due), pick(state["slow"], due)
                torch._foreach_lerp_(fast, slow, weight=1.0 - alpha)
                torch._foreach_copy_(slow, fast)
                torch._foreach_zero_(pick(state["step"], due))

    name = f"lookahead({optimizer.name})"
    return Optimizer(name, init, kernel, optimizer.hyper, optimizer.accepts)
