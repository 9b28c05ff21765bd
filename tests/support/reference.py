"""Running our optimizers and PyTorch's over the same gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import trainstep as ts

SHAPES = {"embed": (7, 3), "a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 5), "scale": ()}


def make_params(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make parameters of several shapes, a zero-dimensional one among them."""
    gen = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=gen).to(dtype) for n, s in SHAPES.items()}


def make_grads(params: dict[str, Tensor], step: int, missing: bool = False) -> dict[str, Tensor]:
    """Make gradients, different at each step; with ``missing``, some parameters lack one at times."""
    gen = torch.Generator().manual_seed(1000 + step)
    grads = {n: torch.randn(p.shape, generator=gen).to(p.dtype) for n, p in params.items()}
    if step % 3 == 1 and "a.bias" in grads:
        grads["a.bias"].zero_()
    if missing:  # b.weight starts late, embed pauses, scale never trains
        dropped = (
            {"scale"} | ({"b.weight"} if step < 2 else set()) | ({"embed"} if step == 3 else set())
        )
        grads = {n: g for n, g in grads.items() if n not in dropped}
    return grads


def assert_equal_bits(
    optimizer: ts.Optimizer,
    make: Callable[[list[Any]], torch.optim.Optimizer],
    *,
    params: dict[str, Tensor] | None = None,
    groups: Sequence[dict[str, Any]] = (),
    rates: Callable[[int], float] | None = None,
    steps: int = 12,
    missing: bool = False,
    donate: bool = False,
) -> Any:
    """Assert that ``optimizer`` and the torch one have equal parameters after every step.

    Args:
        optimizer: ours.
        make: makes PyTorch's from a list of parameters or of groups.
        params: where to start.
        groups: options per group, with a predicate on names under ``"of"``.
        rates: the learning rate of each step; None keeps the defaults.
        steps: how many.
        missing: leave out some gradients at times.
        donate: use ours donated.

    Returns:
        The optimizer state at the end.
    """
    start = make_params() if params is None else params
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    theirs = make(
        [
            {
                **{k: v for k, v in g.items() if k != "of"},
                "params": [p for n, p in leaves.items() if g["of"](n)],
            }
            for g in groups
        ]
        or list(leaves.values())
    )
    ours, state = ts.tree.clone(start), optimizer.init(start)
    for step in range(steps):
        grads = make_grads(start, step, missing)
        hyper = {} if rates is None else {"lr": rates(step)}
        for group in theirs.param_groups:
            group.update(hyper)
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone() if name in grads else None
        theirs.step()
        ours, state = optimizer.apply(ours, grads, state, hyper, donate=donate)
        different = [n for n, leaf in leaves.items() if not torch.equal(ours[n], leaf.detach())]
        assert not different, f"step {step}: {different}"
    return state
