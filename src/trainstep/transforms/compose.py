"""Transformations made of transformations."""

import math
from typing import Any

from trainstep import tree
from trainstep.transforms.base import Context, Transform
from trainstep.types import Grads, Params


def identity() -> Transform:
    """Leave gradients as they are: the neutral element of ``chain``."""

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        return grads, state

    return Transform("identity", update)


def chain(*transforms: Transform) -> Transform:
    """Make one transformation of several, applied in the order given; without any, the identity.

    ``chain(a, chain(b, c))`` gives the same bits as ``chain(chain(a, b), c)``. Its state is the tuple of
    theirs. Where one holds the update (see ``accumulate_every``), those after it are not run.
    """

    def init(params: Params) -> Any:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Grads, state: Any, params: Params, context: Context) -> tuple[Grads, Any]:
        return run(transforms, grads, state, params, context)

    periods = [transform.period for transform in transforms]
    known = [period for period in periods if period is not None]
    period = math.lcm(*known) if len(known) == len(periods) else None
    name = f"chain({', '.join(transform.name for transform in transforms)})"
    return Transform(name, update, init, period=period)


def run(
    transforms: tuple[Transform, ...], grads: Grads, states: Any, params: Params, context: Context
) -> tuple[Grads, tuple[Any, ...]]:
    """Apply transforms in order until one holds the update; returns gradients and next states."""
    after = []
    for transform, state in zip(transforms, states, strict=True):
        if grads:
            grads, state = transform.update(grads, state, params, context)
        elif not context.donated:  # a pure result shares nothing that a donated step may write to
            state = tree.clone(state)
        after.append(state)
    return grads, tuple(after)
