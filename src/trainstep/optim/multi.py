"""Multi-tensor arithmetic that several optimizers share; sizes are floats or tensors on the device.

A float goes to PyTorch's kernels as ``alpha`` or ``value``, with the bits of ``torch.optim``. A tensor
would have to be read by the host for that, so it is multiplied in on the device instead.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

Size = float | Tensor


def add_scaled_(params: list[Tensor], updates: list[Tensor], size: Size) -> None:
    """Do ``params += size * updates``."""
    if isinstance(size, Tensor):
        torch._foreach_add_(params, list(torch._foreach_mul(updates, size)))
    else:
        torch._foreach_add_(params, updates, alpha=size)


def add_quotient_(
    params: list[Tensor], numerators: list[Tensor], denominators: list[Tensor], size: Size
) -> None:
    """Do ``params += size * numerators / denominators``; may overwrite ``denominators``."""
    if isinstance(size, Tensor):
        torch._foreach_div_(denominators, size)
        torch._foreach_addcdiv_(params, numerators, denominators)
    else:
        torch._foreach_addcdiv_(params, numerators, denominators, value=size)


def descent(
    params: list[Tensor], grads: list[Tensor], weight_decay: Size, maximize: bool = False
) -> list[Tensor]:
    """Return the direction to go down from: ``grads`` (negated to ascend) plus the L2 term.

    The gradients themselves are returned if there is nothing to do, so the result is not to be
    written to.
    """
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if isinstance(weight_decay, Tensor):
        return list(torch._foreach_add(grads, list(torch._foreach_mul(params, weight_decay))))
    if weight_decay != 0:
        return list(torch._foreach_add(grads, params, alpha=weight_decay))
    return grads


def shrink_(params: list[Tensor], lr: Size, weight_decay: Size) -> None:
    """Apply decoupled weight decay: ``params *= 1 - lr * weight_decay``."""
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)


def is_rate(name: str) -> bool:
    """Whether a hyperparameter is a learning rate, of all parameters or of a group."""
    return name == "lr" or name.endswith("/lr")


def numbers(hyper: Mapping[str, Any], *names: str) -> list[float]:
    """Return hyperparameters that only the host can use, as floats; reads those that are tensors."""
    return [float(hyper[name]) for name in names]


def tick(steps: list[Tensor]) -> list[float]:
    """Add 1 to step counters on the CPU and return their values."""
    torch._foreach_add_(steps, 1)
    return [step.item() for step in steps]


def by_value(names: list[str], key: Callable[[str], Hashable]) -> dict[Any, list[str]]:
    """Group names by the value of ``key``, in order of appearance."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found
