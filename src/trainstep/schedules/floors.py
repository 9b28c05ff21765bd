"""Cosine schedules that end on a floor instead of 0."""

import math

from trainstep.schedules.base import check, ramp
from trainstep.types import Schedule


def cosine_with_min_lr(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Schedule:
    """Warm up linearly, then follow a cosine down to a floor at ``total_steps``.

    Args:
        peak: rate at the end of the warm-up.
        total_steps: number of updates in the whole run.
        warmup_steps: updates before the peak.
        min_lr: the floor as a rate; give this or ``min_lr_rate``.
        min_lr_rate: the floor as a fraction of ``peak``.
        num_cycles: waves of the cosine; one half goes down once.

    Raises:
        ValueError: unless exactly one of ``min_lr`` and ``min_lr_rate`` is given.
    """
    check("cosine_with_min_lr", peak, total_steps, warmup_steps)
    floor = _floor("cosine_with_min_lr", peak, min_lr, min_lr_rate)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * ramp(step, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * _wave(progress, num_cycles, floor)

    return schedule


def cosine_warmup_with_min_lr(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Schedule:
    """As ``cosine_with_min_lr``, one step ahead, so that the first update already moves.

    The warm-up is ``(step + 1) / warmup_steps``. With ``warmup_lr_rate`` it starts at that fraction of
    the peak instead and rises linearly over ``warmup_steps - 1`` steps.

    Raises:
        ValueError: unless exactly one of ``min_lr`` and ``min_lr_rate`` is given.
    """
    check("cosine_warmup_with_min_lr", peak, total_steps, warmup_steps)
    floor = _floor("cosine_warmup_with_min_lr", peak, min_lr, min_lr_rate)

    def schedule(step: int) -> float:
        if step < warmup_steps and warmup_lr_rate is None:
            return peak * ((step + 1.0) / max(1.0, warmup_steps))
        if step < warmup_steps and warmup_lr_rate is not None:
            rise = (1.0 - warmup_lr_rate) * step / max(1, warmup_steps - 1)
            return peak * (warmup_lr_rate + rise)
        progress = (step - warmup_steps + 1.0) / max(1, total_steps - warmup_steps)
        return peak * _wave(progress, num_cycles, floor)

    return schedule


def _wave(progress: float, num_cycles: float, floor: float) -> float:
    factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0.0, factor * (1 - floor) + floor)


def _floor(name: str, peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        given = "neither" if min_lr is None else "both"
        raise ValueError(
            f"schedules.{name}: give exactly one of min_lr (a rate) and min_lr_rate (a fraction of "
            f"the peak), got {given}"
        )
    if min_lr_rate is not None:
        return min_lr_rate
    if peak == 0:
        raise ValueError(f"schedules.{name}: min_lr needs a peak above 0; use min_lr_rate")
    assert min_lr is not None
    return min_lr / peak
