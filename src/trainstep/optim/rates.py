"""Learning rates (and other hyperparameters) of their own for parts of a model."""

import re
from collections.abc import Callable

import torch

from trainstep.optim.algebra import init_subset, split, update_subset
from trainstep.optim.base import Optimizer, check_range
from trainstep.types import Grads, Hyper, OptState, Params, Schedule


def scaled(optimizer: Optimizer, factor: float, *, name: str = "lr") -> Optimizer:
    """Multiply a hyperparameter, wherever it comes from: the step's schedule, ``hyper`` or the default.

    In a ``partition``, this gives a group a rate relative to the schedule that all groups share.

    Args:
        optimizer: what gets the scaled value; its state is the result's.
        factor: at least 0.
        name: which hyperparameter.

    Raises:
        ValueError: if the optimizer has no such hyperparameter of its own. That of a ``partition``, or of
            a ``chain`` of several optimizers, is with its parts: scale those.
    """
    check_range("scaled", "factor", factor, 0.0)
    _require("scaled", optimizer, name, optimizer.hyper)

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        optimizer.kernel(params, grads, state, {**hyper, name: hyper[name] * factor})

    title = f"scaled({optimizer.name})"
    return Optimizer(title, optimizer.init, kernel, optimizer.hyper, optimizer.accepts)


def scheduled(optimizer: Optimizer, schedule: Schedule, *, name: str = "lr") -> Optimizer:
    """Take a hyperparameter from a schedule of the optimizer's own steps, counted in its state.

    Args:
        optimizer: what gets the value.
        schedule: count of updates so far -> value, as ``trainstep.schedules`` makes them.
        name: which hyperparameter.

    Returns:
        An ``Optimizer`` that does not accept ``name`` any more, so that the schedule of a step reaches the
        other groups of a ``partition`` and not this one. An update without gradients does not count.

    Raises:
        ValueError: if the optimizer has no such hyperparameter.
    """
    _require("scheduled", optimizer, name, optimizer.accepts)

    def init(params: Params) -> OptState:
        return {"step": torch.zeros((), dtype=torch.int64), "optimizer": optimizer.init(params)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        if not grads:
            return
        value = schedule(int(state["step"]))  # on the CPU
        optimizer.kernel(params, grads, state["optimizer"], {**hyper, name: value})
        state["step"].add_(1)

    rest = {k: v for k, v in optimizer.hyper.items() if k != name}
    title = f"scheduled({optimizer.name})"
    return Optimizer(title, init, kernel, rest, optimizer.accepts - {name})


def layerwise_decay(
    optimizer: Optimizer, decay: float, depth_of: Callable[[str], int]
) -> Optimizer:
    """Lower the learning rate towards the input: ``lr * decay ** depth``.

    Used in fine-tuning (Howard and Ruder, 2018, arXiv:1801.06146; Clark et al., 2020, arXiv:2003.10555).

    Args:
        optimizer: for every layer; each depth keeps a state of its own.
        decay: factor per layer, above 0 and at most 1.
        depth_of: parameter name -> layers above it, 0 for the output; see ``depth_from_top``.

    Raises:
        ValueError: for a decay out of range, an optimizer without a learning rate of its own, or (from
            ``init``) a depth below 0.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"optim.layerwise_decay: decay must be in (0, 1], got {decay}")
    _require("layerwise_decay", optimizer, "lr", optimizer.hyper)

    def by_depth(names: Params | Grads, params: Params) -> dict[int, list[str]]:
        return split(names, params, lambda name, param: depth_of(name))

    def init(params: Params) -> OptState:
        groups = by_depth(params, params)
        for depth, names in groups.items():
            if depth < 0:
                raise ValueError(
                    f"optim.layerwise_decay: depth_of gave {depth} for parameter {names[0]}; a depth "
                    "is the number of layers above, at least 0"
                )
        return {str(d): init_subset(optimizer, params, groups[d]) for d in sorted(groups)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for depth, names in by_depth(grads, params).items():
            own = {**hyper, "lr": hyper["lr"] * decay**depth}
            update_subset(optimizer, names, params, grads, state[str(depth)], own)

    title = f"layerwise_decay({optimizer.name})"
    return Optimizer(title, init, kernel, optimizer.hyper, optimizer.accepts)


def depth_from_top(
    layers: int, *, block: str = r"(?:^|\.)(\d+)\.", first: str = r"embed|wte|wpe|patch"
) -> Callable[[str], int]:
    """Return a ``depth_of`` for a stack of numbered blocks.

    Args:
        layers: number of blocks.
        block: regular expression whose first group is a block's number, from 0.
        first: regular expression for what comes before the blocks, such as embeddings.

    Returns:
        A function of a parameter's name: block ``i`` is ``layers - i`` deep, what comes before the blocks
        ``layers + 1``, everything else (final norm, head) 0.
    """
    number, before = re.compile(block), re.compile(first)

    def depth_of(name: str) -> int:
        if found := number.search(name):
            return layers - int(found.group(1))
        return layers + 1 if before.search(name) else 0

    return depth_of


def _require(where: str, optimizer: Optimizer, name: str, known: Hyper | frozenset[str]) -> None:
    if name not in known:
        raise ValueError(
            f"optim.{where}: {optimizer.name} has no hyperparameter {name!r} of its own; it has: "
            f"{', '.join(sorted(known)) or 'none'}. Apply {where} to the optimizers inside it."
        )
