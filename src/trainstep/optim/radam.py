"""RAdam (Liu et al., 2020), with the bits of ``torch.optim.RAdam(foreach=True)``."""

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick, zeros
from trainstep.optim.multi import descent, numbers, shrink_, tick
from trainstep.types import Grads, Hyper, OptState, Params


def radam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """RAdam: Adam whose adaptive rate is rectified while the second moment has few samples.

    Source: "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv:1908.03265). While the
    approximated moving average is no longer than 5, the update is that of SGD with momentum.

    Args:
        lr: learning rate where the step has no schedule.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: L2 term added to the gradients, unless decoupled.
        decoupled_weight_decay: scale parameters by ``1 - lr * weight_decay`` instead, as AdamW does.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``.

    Raises:
        ValueError: for values out of range.
    """
    check_range("radam", "lr", lr, 0.0)
    check_range("radam", "betas[0]", betas[0], 0.0, 1.0)
    check_range("radam", "betas[1]", betas[1], 0.0, 1.0)
    check_range("radam", "eps", eps, 0.0)
    check_range("radam", "weight_decay", weight_decay, 0.0)

    def init(params: Params) -> OptState:
        return {
            "step": counters(params, on_device=False),
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
    }
    return Optimizer("radam", init, kernel, hyper)


def _update(
    params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], hyper: Hyper
) -> None:
    lr, beta1, beta2, eps = numbers(hyper, "lr", "beta1", "beta2", "eps")
    first, second = state["exp_avg"], state["exp_avg_sq"]
    steps = tick(state["step"])
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    rectifiers = [_rectifier(step, beta2) for step in steps]
    biases = [1 - beta1**step for step in steps]
    plain = [
        (lr * (0 if rectifier > 0 else 1.0) / bias) * -1
        for rectifier, bias in zip(rectifiers, biases, strict=True)
    ]
    adaptive = [
        ((1 - beta2**step) ** 0.5) * (lr * rectifier / bias) * -1
        for step, rectifier, bias in zip(steps, rectifiers, biases, strict=True)
    ]
    # scale = adaptive / (sqrt(v) + eps) + plain; one of the two is zero, and x / 0 inverts to 0.
    scale = torch._foreach_sqrt(second)
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(scale, adaptive)
    torch._foreach_reciprocal_(scale)
    torch._foreach_add_(scale, plain)
    torch._foreach_addcmul_(params, first, scale)


def _rectifier(step: float, beta2: float) -> float:
    """Return the paper's r_t, or 0 while the moving average is too short to have a variance."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (beta2**step) / (1 - beta2**step)
    if length <= 5:
        return 0
    tail = (longest - 4) * (longest - 2) * length
    return float(((length - 4) * (length - 2) * longest / tail) ** 0.5)
