"""Schedule-free AdamW and SGD (Defazio et al., 2024): an average of iterates instead of a schedule.

Gradients are taken at ``y``, which is what the state calls its parameters; ``z`` is the plain iterate and
``x``, the weighted average of the ``z``, is what to evaluate: ``y = beta * x + (1 - beta) * z``.
"""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.optim.base import Optimizer, check_range, counters, groups, pick, zeros
from trainstep.optim.multi import by_value, descent, numbers
from trainstep.optim.nodes import Source, find_nodes, unpack
from trainstep.types import Grads, Hyper, OptState, Params

_NODE = "schedule_free"


def schedule_free_adamw(
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Optimizer:
    """AdamW that needs no schedule. Evaluate on ``schedule_free_params(state)``.

    Source: "The Road Less Scheduled" (arXiv:2405.15682); the bits are those of the
    ``AdamWScheduleFree`` of the package schedulefree.

    Args:
        lr: learning rate where the step has no schedule; a schedule adds to the method's own warm-up.
        betas: interpolation between average and iterate (above 0), decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decay towards zero, taken at ``y``.
        warmup_steps: the rate grows linearly over so many updates.
        r: the t-th iterate enters the average with a weight proportional to ``t ** r``.
        weight_lr_power: and to the largest rate so far to this power.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta2``, ``eps``, ``weight_decay``. ``betas[0]``
        belongs to the state, which could not be evaluated without it. Counts are per parameter.

    Raises:
        ValueError: for values out of range.
    """
    name = "schedule_free_adamw"
    check_range(name, "betas[1]", betas[1], 0.0, 1.0)
    check_range(name, "eps", eps, 0.0)

    def direct(ps: list[Tensor], gs: list[Tensor], moments: Any, step: float, hyper: Hyper) -> Any:
        beta2, floor = numbers(hyper, "beta2", "eps")
        torch._foreach_mul_(moments, beta2)
        torch._foreach_addcmul_(moments, gs, gs, value=1 - beta2)
        roots = list(torch._foreach_div(moments, 1 - beta2**step))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, floor)
        return list(torch._foreach_div(gs, roots))

    hyper = {"lr": lr, "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    return _schedule_free(name, betas[0], hyper, warmup_steps, r, weight_lr_power, direct)


def schedule_free_sgd(
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Optimizer:
    """SGD that needs no schedule; ``momentum`` (above 0) is AdamW's ``betas[0]``, arguments as there.

    The bits are those of the ``SGDScheduleFree`` of the package schedulefree.
    """

    def direct(ps: list[Tensor], gs: list[Tensor], moments: Any, step: float, hyper: Hyper) -> Any:
        return gs

    hyper = {"lr": lr, "weight_decay": weight_decay}
    return _schedule_free(
        "schedule_free_sgd", momentum, hyper, warmup_steps, r, weight_lr_power, direct
    )


def schedule_free_params(state: Source, params: Params | None = None) -> Params:
    """Return the averaged parameters ``x``, on which to evaluate: ``evaluate(state.evolve(params=...))``.

    Args:
        state: a ``TrainState``, or an ``opt_state`` with its parameters given as ``params``.
        params: the parameters ``y`` that go with a bare ``opt_state``.

    Returns:
        A dict of all parameters; those of other optimizers (in a ``partition``) as they are.

    Raises:
        ValueError: if no schedule-free optimizer made the state, or there are no parameters to start from.
    """
    opt_state, params = unpack("schedule_free_params", state, params)
    nodes = find_nodes(opt_state, _NODE)
    if not nodes:
        raise ValueError(
            "optim.schedule_free_params: the state has no schedule-free average; it is kept by "
            "optim.schedule_free_adamw and optim.schedule_free_sgd"
        )
    averages = dict(params)
    for node in nodes:
        # y.lerp(z, 1 - 1/beta) solves y = beta * x + (1 - beta) * z for x.
        beta = node["beta"].item()
        averages |= {
            n: params[n].lerp(z, 1 - 1 / beta) for n, z in node["z"].items() if n in params
        }
    return averages


def _schedule_free(
    name: str,
    beta: float,
    hyper: dict[str, float],
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    direct: Any,
) -> Optimizer:
    check_range(name, "lr", hyper["lr"], 0.0)
    check_range(name, "weight_decay", hyper["weight_decay"], 0.0)
    check_range(name, "warmup_steps", warmup_steps, 0)
    if not 0 < beta < 1:
        raise ValueError(f"optim.{name}: momentum (betas[0]) must be in (0, 1), got {beta}")
    adaptive = "beta2" in hyper

    def init(params: Params) -> OptState:
        node = {
            "beta": torch.tensor(beta, dtype=torch.float64),
            "z": tree.clone(params),
            "step": counters(params, on_device=False),
            "weight_sum": {n: torch.zeros((), dtype=torch.float64) for n in params},
            "lr_max": {n: torch.zeros((), dtype=torch.float64) for n in params},
        }
        moments = {"exp_avg_sq": zeros(params)} if adaptive else {}
        return {_NODE: node, **moments}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        node = state[_NODE]

        def progress(n: str) -> tuple[float, ...]:  # all on the CPU
            return tuple(node[key][n].item() for key in ("step", "weight_sum", "lr_max"))

        lr, decay = numbers(hyper, "lr", "weight_decay")
        for run in groups(params, grads):
            for (done, weight_sum, lr_max), names in by_value(run, progress).items():
                step = done + 1
                rate = lr * (step / warmup_steps if done < warmup_steps else 1.0)
                lr_max = max(rate, lr_max)
                weight = (step**r) * (lr_max**weight_lr_power)
                weight_sum += weight
                share = weight / weight_sum if weight_sum else 0.0
                for key, value in (("step", step), ("weight_sum", weight_sum), ("lr_max", lr_max)):
                    for n in names:
                        node[key][n].fill_(value)
                ys, zs = pick(params, names), pick(node["z"], names)
                moments = pick(state["exp_avg_sq"], names) if adaptive else []
                gs = direct(ys, pick(grads, names), moments, step, hyper)
                gs = descent(ys, gs, decay)
                torch._foreach_lerp_(ys, zs, weight=share)
                torch._foreach_add_(ys, gs, alpha=rate * (beta * (1 - share) - 1))
                torch._foreach_sub_(zs, gs, alpha=rate)

    return Optimizer(name, init, kernel, hyper)
