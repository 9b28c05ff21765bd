"""Adafactor (Shazeer and Stern, 2018) as PyTorch defines it, with the bits of ``torch.optim.Adafactor``."""

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick
from trainstep.optim.multi import by_value, descent, numbers, shrink_, tick
from trainstep.types import Grads, Hyper, OptState, Params


def adafactor(
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adafactor: Adam's second moment of a matrix kept as one row and one column.

    Source: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv:1804.04235), with
    PyTorch's reading of ``lr`` and ``eps``: the t-th update is
    ``max(eps[1], rms(p)) * min(lr, 1 / sqrt(t))`` times the gradient divided by the root of the factored
    second moment, clipped to a root mean square of ``d``.

    Args:
        lr: largest relative step size, and the factor of weight decay.
        beta2_decay: the t-th decay rate of the second moment is ``1 - t ** beta2_decay``; at most 0.
        eps: floor of the root of the second moment (None: the machine epsilon of the parameter's dtype)
            and floor of the root mean square of a parameter.
        d: clipping threshold; at least 1.
        weight_decay: decoupled decay; each update first scales parameters by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``weight_decay``. Tensors of two and more axes keep
        a factored moment over the last two, others a full one. The bits are those of
        ``torch.optim.Adafactor(foreach=True)``; the two norms that PyTorch reads to the host stay on
        the device.

    Raises:
        ValueError: for values out of range.
    """
    check_range("adafactor", "lr", lr, 0.0)
    check_range("adafactor", "eps[0]", eps[0] or 0.0, 0.0)
    check_range("adafactor", "eps[1]", eps[1], 0.0)
    check_range("adafactor", "d", d, 1.0)
    check_range("adafactor", "weight_decay", weight_decay, 0.0)
    if beta2_decay > 0:
        raise ValueError(f"optim.adafactor: beta2_decay must be at most 0, got {beta2_decay}")

    def init(params: Params) -> OptState:
        matrices = {n: p for n, p in params.items() if p.dim() > 1}
        return {
            "step": counters(params, on_device=False),
            "row_var": {n: p.new_zeros((*p.shape[:-1], 1)) for n, p in matrices.items()},
            "col_var": {
                n: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) for n, p in matrices.items()
            },
            "variance": {n: torch.zeros_like(p) for n, p in params.items() if p.dim() <= 1},
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        lr, weight_decay = numbers(hyper, "lr", "weight_decay")
        for run in groups(params, grads):
            for names in by_value(run, lambda n: params[n].dim() > 1).values():
                ps = pick(params, names)
                gs = descent(ps, pick(grads, names), 0.0, maximize)
                steps = tick(pick(state["step"], names))
                floor = torch.finfo(ps[0].dtype).eps if eps[0] is None else eps[0]
                sizes = [
                    _rms(p).clamp(min=eps[1]) * min(lr, 1 / (step**0.5))
                    for p, step in zip(ps, steps, strict=True)
                ]
                shrink_(ps, lr, weight_decay)
                updates = _second_moments(
                    names, gs, state, [step**beta2_decay for step in steps], floor
                )
                # The floor is of the root, so its square is of the square.
                torch._foreach_clamp_min_(updates, floor * floor)
                torch._foreach_rsqrt_(updates)
                torch._foreach_mul_(updates, gs)
                _scale_(
                    updates,
                    [
                        -size / _rms(update, d).clamp(min=1.0)
                        for update, size in zip(updates, sizes, strict=True)
                    ],
                )
                torch._foreach_add_(ps, updates)

    return Optimizer("adafactor", init, kernel, {"lr": lr, "weight_decay": weight_decay})


def _second_moments(
    names: list[str], grads: list[Tensor], state: OptState, news: list[float], floor: float
) -> list[Tensor]:
    """Update the moments of one run with the shares ``news``; return copies, expanded to full shape."""
    if grads[0].dim() <= 1:
        variances = pick(state["variance"], names)
        torch._foreach_lerp_(variances, torch._foreach_mul(grads, grads), news)
        return [variance.clone() for variance in variances]
    rows, columns = pick(state["row_var"], names), pick(state["col_var"], names)
    for moments, axis in ((rows, -1), (columns, -2)):
        # The mean of squares by way of the norm, which makes no tensor of the gradient's size.
        means = [torch.norm(grad, dim=axis, keepdim=True) for grad in grads]
        torch._foreach_mul_(means, means)
        torch._foreach_div_(means, [grad.size(axis) for grad in grads])
        torch._foreach_lerp_(moments, means, news)
    full = [row @ column for row, column in zip(rows, columns, strict=True)]
    totals = [row.mean(dim=-2, keepdim=True) for row in rows]
    torch._foreach_clamp_min_(totals, floor)
    torch._foreach_div_(full, totals)
    return full


def _rms(tensor: Tensor, unit: float = 1.0) -> Tensor:
    """Return the root mean square over ``unit``, in float64, where PyTorch computes it on the host."""
    norm = tensor.norm(2).double()
    # By a tensor: CUDA kernels divide by a number by multiplying with its reciprocal, which rounds twice.
    return norm / torch.full_like(norm, (tensor.numel() ** 0.5) * unit)


def _scale_(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """Multiply by float64 scalars, with the bits of multiplying by host numbers."""
    if tensors[0].is_cpu:
        torch._foreach_mul_(tensors, [factor.item() for factor in factors])
        return
    for tensor, factor in zip(tensors, factors, strict=True):
        if tensor.dtype in (torch.bfloat16, torch.float16):  # a kernel takes a number as float32
            tensor.copy_(tensor.float().mul_(factor))
        else:
            tensor.mul_(factor)
