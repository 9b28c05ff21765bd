"""Muon (Jordan et al., 2024): orthogonalised momentum, with the bits of ``torch.optim.Muon``."""

import math
import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trainstep.optim.base import Optimizer, check_range, groups, pick, zeros
from trainstep.optim.multi import numbers
from trainstep.types import Grads, Hyper, OptState, Params

AdjustLr = Literal["original", "match_rms_adamw"]


def muon(
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: AdjustLr | None = None,
) -> Optimizer:
    """Muon: step along the nearest (semi-)orthogonal matrix to the momentum.

    Source: kellerjordan.github.io/posts/muon and "Muon is Scalable for LLM Training" (arXiv:2502.16982).
    Only for the matrices of hidden layers. Give the rest of a model to another optimizer::

        partition(matrices(), {"matrix": muon(lr=0.02), "rest": adamw(lr=3e-4)})

    Args:
        lr: learning rate where the step has no schedule.
        weight_decay: decoupled decay; each update first scales parameters by ``1 - lr * weight_decay``.
        momentum: decay rate of the running mean of gradients.
        nesterov: look ahead: interpolate the gradient with the mean once more.
        ns_coefficients: of the quintic Newton-Schulz iteration, which runs in bfloat16.
        eps: floor of the norm that the matrix is divided by first.
        ns_steps: iterations; below 100.
        adjust_lr_fn: ``"original"`` (or None) multiplies the rate by ``sqrt(max(1, rows / columns))``,
            ``"match_rms_adamw"`` by ``0.2 * sqrt(max(rows, columns))``, so that AdamW's rate can be reused.

    Returns:
        An ``Optimizer`` with hyperparameters ``lr``, ``weight_decay``, ``momentum``. The bits are those
        of ``torch.optim.Muon``, but for ``nesterov=False`` on bfloat16: PyTorch 2.13 normalises its
        momentum in place there; here it is left alone.

    Raises:
        ValueError: for values out of range; from ``init``, naming parameters that are no matrices.
    """
    check_range("muon", "lr", lr, 0.0)
    check_range("muon", "weight_decay", weight_decay, 0.0)
    check_range("muon", "momentum", momentum, 0.0)
    check_range("muon", "ns_steps", ns_steps, 0, 100)
    if len(ns_coefficients) != 3:
        raise ValueError(f"optim.muon: ns_coefficients must be three numbers: {ns_coefficients}")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(
            'optim.muon: adjust_lr_fn must be None, "original" or "match_rms_adamw", '
            f"got {adjust_lr_fn!r}"
        )

    def init(params: Params) -> OptState:
        others = [f"{n} {tuple(p.shape)}" for n, p in params.items() if p.ndim != 2]
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            raise ValueError(
                f"optim.muon: expected matrices (2 axes), got {', '.join(others[:5])}{more}. Give "
                'them to another optimizer: optim.partition(optim.matrices(), {"matrix": '
                'optim.muon(), "rest": optim.adamw()})'
            )
        return {"momentum_buffer": zeros(params)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        lr, (mass,) = hyper["lr"], numbers(hyper, "momentum")
        for names in groups(params, grads):
            ps, gs = pick(params, names), pick(grads, names)
            means = pick(state["momentum_buffer"], names)
            torch._foreach_lerp_(means, gs, 1 - mass)
            updates = list(torch._foreach_lerp(gs, means, mass)) if nesterov else means
            for p, update in zip(ps, updates, strict=True):
                direction = _orthogonalised(update, ns_coefficients, ns_steps, eps)
                # One by one, as PyTorch does: multi-tensor kernels round otherwise in bfloat16 on the CPU.
                p.mul_(1 - lr * hyper["weight_decay"])
                size = -(lr * _rate_ratio(p, adjust_lr_fn))
                if isinstance(size, Tensor):
                    p.add_(direction.to(p.dtype) * size)
                else:
                    p.add_(direction, alpha=size)

    hyper = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    return Optimizer("muon", init, kernel, hyper)


def matrices(exclude: str = r"embed|wte|wpe|head") -> Callable[[str, Tensor], str]:
    """Return labels for ``partition``: ``"matrix"`` for what Muon is for, ``"rest"`` for the others.

    Args:
        exclude: regular expression; matrices whose name matches it (embeddings and the output layer, to
            which Muon does not apply) are ``"rest"``. The empty string excludes none.
    """
    pattern = re.compile(exclude) if exclude else None

    def label_of(name: str, param: Tensor) -> str:
        excluded = pattern is not None and pattern.search(name)
        return "matrix" if param.ndim == 2 and not excluded else "rest"

    return label_of


def _orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return about ``U @ V.T`` of ``matrix = U @ S @ V.T`` in bfloat16: singular values in (0.5, 1.5)."""
    a, b, c = coefficients
    x = matrix.bfloat16()
    tall = matrix.size(0) > matrix.size(1)
    if tall:  # the Gram matrix of the shorter side is the cheaper one
        x = x.T
    x = x.div(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _rate_ratio(param: Tensor, adjust: AdjustLr | None) -> float:
    rows, columns = param.shape
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
