"""Checks of what a step is composed of, with words on what was probably meant."""

import inspect
from typing import Any

from torch import nn

from trainstep.grads import check_order
from trainstep.optim.base import Optimizer
from trainstep.transforms import Transform


def check_parts(optimizer: Any, schedule: Any, transforms: tuple[Any, ...]) -> None:
    """Check the kinds of the parts that ``make_step`` was given.

    Raises:
        TypeError: naming the first that is not of its kind.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"make_step: optimizer must be one of trainstep.optim, got {_kind(optimizer)}; "
            f"{_optimizer_hint(optimizer)}"
        )
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"make_step: schedule must be a function of the step, got {_kind(schedule)}; for a constant "
            "rate use trainstep.schedules.constant(rate), or give lr=rate to the optimizer"
        )
    for place, transform in enumerate(transforms):
        if isinstance(transform, Transform):
            continue
        if isinstance(transform, Optimizer):
            hint = "give it as make_step's optimizer; several make one with trainstep.optim.chain"
        elif callable(transform):
            hint = "call it with its arguments, as clip_by_global_norm(1.0), to make the transform"
        else:
            hint = "see trainstep.transforms"
        raise TypeError(
            f"make_step: transforms[{place}] must be a Transform, got {_kind(transform)}; {hint}"
        )


def check_loss(loss_fn: Any) -> None:
    """Check that a loss can be called as ``loss_fn(params, buffers, batch, key)``, if that can be told.

    Raises:
        TypeError: if not; for a module and for what ``module_loss`` takes, says what to do with it.
    """
    wanted = "loss_fn must be a function loss_fn(params, buffers, batch, key)"
    if not callable(loss_fn):
        raise TypeError(f"make_step: {wanted}, got {_kind(loss_fn)}; see trainstep.module_loss")
    module = isinstance(loss_fn, nn.Module)
    try:
        signature = inspect.signature(loss_fn.forward if module else loss_fn)
    except (ValueError, TypeError):  # of something built in
        return
    try:
        signature.bind("params", "buffers", "batch", "key")
    except TypeError:
        hint = (
            "make one of it with trainstep.module_loss(model, function)"
            if module
            else "of a function of (call, batch) make one with trainstep.module_loss(model, function)"
        )
        raise TypeError(
            f"make_step: {wanted}, got {_kind(loss_fn)}, which takes {signature}; {hint}"
        ) from None


def check_choices(microbatches: Any, on_nonfinite: Any, order: Any, *, scales: bool) -> None:
    """Check the choices that ``make_step`` was given.

    Raises:
        ValueError: naming the first that does not exist, or contradicts a loss scale.
    """
    if not (microbatches == "iter" or (isinstance(microbatches, int) and microbatches >= 1)):
        raise ValueError(
            f'make_step: microbatches must be an int of at least 1, or "iter"; got {microbatches!r}'
        )
    if on_nonfinite not in ("ignore", "skip", "raise"):
        raise ValueError(
            f'make_step: on_nonfinite must be "ignore", "skip" or "raise"; got {on_nonfinite!r}'
        )
    check_order("make_step", order)
    if scales and on_nonfinite == "raise":
        raise ValueError(
            'make_step: on_nonfinite="raise" would stop at the first overflow, which loss_scale skips '
            'and learns from; use "ignore" or "skip" with it'
        )


def check_names(names: list[str]) -> None:
    """Raise ValueError unless guards can keep their memory under these names."""
    if len({*names, "transforms", "skipped"}) != len(names) + 2:
        raise ValueError(
            'make_step: guards need names that differ from each other and from "transforms" and '
            f'"skipped", because they name their memory in state.extras; got {", ".join(names)}'
        )


def _optimizer_hint(optimizer: Any) -> str:
    if callable(optimizer):
        return "call it with its arguments, as trainstep.optim.adamw(lr=1e-3), to make one"
    return "of a torch.optim class, make one with trainstep.optim.from_torch(cls, **options)"


def _kind(value: Any) -> str:
    if isinstance(value, Optimizer):
        return f"the optimizer {value.name}"
    name = getattr(value, "__name__", None)
    return f"the function {name}" if name and callable(value) else f"{type(value).__name__}"
