"""Schedules that warm up and then go down: constant, linear, cosine, polynomial, inverse square root."""

import math

from trainstep.schedules.base import check, ramp
from trainstep.types import Schedule


def constant(peak: float, warmup_steps: int = 0) -> Schedule:
    """Return ``peak`` at every step, after a linear warm-up from 0 over ``warmup_steps`` steps."""
    check("constant", peak, None, warmup_steps)

    def schedule(step: int) -> float:
        return peak * ramp(step, warmup_steps)

    return schedule


def linear(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Warm up linearly from 0 to ``peak``, then go down linearly to 0 at ``total_steps``."""
    check("linear", peak, total_steps, warmup_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return schedule


def cosine(
    peak: float, total_steps: int, warmup_steps: int = 0, *, num_cycles: float = 0.5
) -> Schedule:
    """Warm up linearly, then follow a cosine to 0 at ``total_steps``; beyond, it rises again.

    Args:
        peak: rate at the end of the warm-up.
        total_steps: number of updates in the whole run.
        warmup_steps: updates before the peak; if there are more than ``total_steps``, a run of that length
            ends while it warms up.
        num_cycles: waves of the cosine; one half goes from the peak to 0 once.
    """
    check("cosine", peak, total_steps, warmup_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))

    return schedule


def cosine_with_restarts(
    peak: float, total_steps: int, warmup_steps: int = 0, *, num_cycles: float = 1
) -> Schedule:
    """Warm up linearly, then go from ``peak`` to 0 along a half cosine, ``num_cycles`` times.

    Each cycle but the first starts again at the peak without a warm-up. From ``total_steps`` on it is 0.
    (SGDR: Loshchilov and Hutter, 2017, with cycles of equal length.)
    """
    check("cosine_with_restarts", peak, total_steps, warmup_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if progress >= 1.0:
            return 0.0
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))

    return schedule


def polynomial(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    lr_end: float = 1e-7,
    power: float = 1.0,
) -> Schedule:
    """Warm up linearly, then go down to ``lr_end`` at ``total_steps`` as a power of what remains.

    Raises:
        ValueError: unless ``peak`` is above ``lr_end``.
    """
    check("polynomial", peak, total_steps, warmup_steps)
    if not peak > lr_end:
        raise ValueError(
            f"schedules.polynomial: peak must be above lr_end ({lr_end}), got {peak}; pass a smaller "
            "lr_end"
        )
    decay_steps = total_steps - warmup_steps

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        if step > total_steps or decay_steps <= 0:
            return peak * (lr_end / peak)
        remaining = 1 - (step - warmup_steps) / decay_steps
        # Divided and multiplied by the peak, as a multiplier of the base rate is in the reference.
        rate: float = ((peak - lr_end) * remaining**power + lr_end) / peak
        return peak * rate

    return schedule


def inverse_sqrt(peak: float, warmup_steps: int = 0, *, timescale: int | None = None) -> Schedule:
    """Warm up linearly, then fall as ``1 / sqrt``, without an end.

    Args:
        peak: rate at the end of the warm-up.
        warmup_steps: updates before the peak.
        timescale: after this many more steps the rate is ``peak / sqrt(2)``; None takes
            ``warmup_steps``, or 10 000 without a warm-up.

    Raises:
        ValueError: for a ``timescale`` that is not above 0.
    """
    check("inverse_sqrt", peak, None, warmup_steps)
    scale = (warmup_steps or 10_000) if timescale is None else timescale
    if not scale > 0:
        raise ValueError(f"schedules.inverse_sqrt: timescale must be above 0, got {timescale}")

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        return peak * (1.0 / math.sqrt((step + (scale - warmup_steps)) / scale))

    return schedule
