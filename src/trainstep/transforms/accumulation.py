"""``accumulate_every``: gradients of several calls make one update."""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.transforms.base import Context, Transform, groups
from trainstep.types import Grads, Params


def accumulate_every(k: int) -> Transform:
    """Collect gradients over ``k`` calls of the step and update on the last of them.

    Calls are counted by ``context.step``, so which of them update is known on the host: those with
    ``(step + 1) % k == 0``. On the others no gradient comes out, which holds the update: parameters and
    optimizer state stay as they are, to the bit, and later transforms are not run. On the last, the
    mean over all items of the ``k`` batches comes out: gradients are weighted by ``context.weight``,
    summed in the order of the calls and divided once. Put transforms that belong to each batch
    before it, and those that belong to the update after it.

    Note that ``state.step`` and the schedule count calls, not updates.

    The state holds the sums, as large as the parameters. A parameter that no call has reached yet
    comes out without a gradient; once reached it always has one.

    Raises:
        ValueError: if ``k`` is not an int of at least 1.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"transforms.accumulate_every: k must be an int of at least 1: {k!r}")

    def init(params: Params) -> Any:
        return {
            "sum": {name: _empty(param) for name, param in params.items()},
            "reached": dict.fromkeys(params, False),
            "weight": _scalar(params),
            "unit": _scalar(params),
        }

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        state = _add(grads, state, context)
        if (context.step + 1) % k:
            return {}, state
        return _take(state, params, context)

    return Transform("accumulate_every", update, init, period=k)


def _add(grads: Grads, state: Any, context: Context) -> Any:
    weight, unit = state["weight"], state["unit"]
    items = context.weight
    items = items.to(weight) if isinstance(items, Tensor) else torch.full_like(weight, items)
    # Sums are kept in units of the first weight: equal ones then count exactly 1 each.
    unit = torch.where(weight == 0, items, unit)
    share = items / unit
    sums = state["sum"] if context.donated else tree.clone(state["sum"])
    for names in groups(grads):
        group = [grads[n] for n in names]
        scaled = torch._foreach_mul(group, share.to(group[0].device))
        torch._foreach_add_([sums[n] for n in names], scaled)
    reached = {name: seen or name in grads for name, seen in state["reached"].items()}
    return {"sum": sums, "reached": reached, "weight": weight + share, "unit": unit}


def _take(state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
    """Return the means and an empty state; the sums are ours, since ``_add`` made or got them."""
    sums, reached, weight = state["sum"], state["reached"], state["weight"]
    means = {name: total.clone() for name, total in sums.items()} if context.donated else sums
    if context.donated:
        for total in sums.values():
            total.fill_(-0.0)
    else:
        sums = {name: _empty(param) for name, param in params.items()}
    means = {name: mean.div_(weight.to(mean.device)) for name, mean in means.items()}
    empty = {**state, "sum": sums, "weight": torch.zeros_like(weight)}
    return {n: g for n, g in means.items() if reached[n]}, empty


def _empty(param: Tensor) -> Tensor:
    # Minus zero is what can be added to any number, zeros of both signs included, without a trace.
    return torch.full_like(param, -0.0, memory_format=torch.preserve_format)


def _scalar(params: Params) -> Tensor:
    first = next(iter(params.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=first.device)
