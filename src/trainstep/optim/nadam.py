"""NAdam (Dozat, 2016), with the bits of ``torch.optim.NAdam(foreach=True)``."""

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick, zeros
from trainstep.optim.multi import descent, numbers, shrink_, tick
from trainstep.types import Grads, Hyper, OptState, Params


def nadam(
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """NAdam: Adam with Nesterov momentum, whose decay rate warms up.

    Source: "Incorporating Nesterov Momentum into Adam" (openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    Args:
        lr: learning rate where the step has no schedule.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: L2 term added to the gradients, unless decoupled.
        momentum_decay: the t-th decay rate is ``beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))``.
        decoupled_weight_decay: scale parameters by ``1 - lr * weight_decay`` instead, as AdamW does.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``,
        ``momentum_decay``.

    Raises:
        ValueError: for values out of range.
    """
    check_range("nadam", "lr", lr, 0.0)
    check_range("nadam", "betas[0]", betas[0], 0.0, 1.0)
    check_range("nadam", "betas[1]", betas[1], 0.0, 1.0)
    check_range("nadam", "eps", eps, 0.0)
    check_range("nadam", "weight_decay", weight_decay, 0.0)
    check_range("nadam", "momentum_decay", momentum_decay, 0.0)

    def init(params: Params) -> OptState:
        return {
            "step": counters(params, on_device=False),
            # The product of the momentum rates so far: starts at 1, unlike everything else.
            "mu_product": {n: torch.ones((), dtype=torch.float32) for n in params},
            "exp_avg": zeros(params),
            "exp_avg_sq": zeros(params),
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for names in groups(params, grads):
            ps, gs = pick(params, names), pick(grads, names)
            if decoupled_weight_decay:
                gs = descent(ps, gs, 0.0, maximize)
                shrink_(ps, hyper["lr"], hyper["weight_decay"])
            else:
                gs = descent(ps, gs, hyper["weight_decay"], maximize)
            _update(ps, gs, {key: pick(kept, names) for key, kept in state.items()}, hyper)

    hyper = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
    }
    return Optimizer("nadam", init, kernel, hyper)


def _update(
    params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], hyper: Hyper
) -> None:
    lr, beta1, beta2, eps, decay = numbers(hyper, "lr", "beta1", "beta2", "eps", "momentum_decay")
    first, second = state["exp_avg"], state["exp_avg_sq"]
    steps = tick(state["step"])
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    rates = [beta1 * (1.0 - 0.5 * (0.96 ** (step * decay))) for step in steps]
    ahead = [beta1 * (1.0 - 0.5 * (0.96 ** ((step + 1) * decay))) for step in steps]
    torch._foreach_mul_(state["mu_product"], rates)
    products = [product.item() for product in state["mu_product"]]  # on the CPU
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominator, eps)
    of_grad = [
        (lr * (1.0 - rate) / (1.0 - product)) * -1
        for rate, product in zip(rates, products, strict=True)
    ]
    of_first = [
        (lr * rate / (1.0 - product * rate)) * -1
        for rate, product in zip(ahead, products, strict=True)
    ]
    torch._foreach_addcdiv_(params, grads, denominator, of_grad)
    torch._foreach_addcdiv_(params, first, denominator, of_first)
