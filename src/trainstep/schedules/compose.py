"""Schedules made of schedules."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from trainstep.schedules.base import check
from trainstep.schedules.decay import constant
from trainstep.types import Schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Play schedules one after another; each counts its own steps from 0.

    Args:
        schedules: the parts, in order.
        boundaries: the step at which each part but the first takes over; one fewer than schedules.

    Raises:
        ValueError: if there are not as many boundaries as changes, or they do not rise.
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"schedules.join: {len(schedules)} schedules need {len(schedules) - 1} boundaries, "
            f"got {len(boundaries)}"
        )
    starts = [0, *boundaries]
    if any(b <= a for a, b in pairwise(starts)):
        raise ValueError(
            f"schedules.join: boundaries must rise and be above 0, got {list(boundaries)}"
        )
    parts = tuple(schedules)

    def schedule(step: int) -> float:
        index = max(bisect_right(starts, step) - 1, 0)
        return parts[index](step - starts[index])

    return schedule


def warmup(after: float | Schedule, warmup_steps: int, *, start: float = 0.0) -> Schedule:
    """Rise linearly from ``start`` over ``warmup_steps`` steps, then play ``after`` from its step 0.

    Args:
        after: a schedule, or a peak to stay at. The rise ends on its rate at step 0.
        warmup_steps: length of the rise; ``after`` is delayed by as much.
        start: the rate at step 0.
    """
    main = after if callable(after) else constant(after)
    peak = main(0)
    check("warmup", peak, None, warmup_steps)

    def schedule(step: int) -> float:
        if step >= warmup_steps:
            return main(step - warmup_steps)
        return start + (peak - start) * (step / warmup_steps)

    return schedule


def piecewise(peak: float, factors: Mapping[int, float]) -> Schedule:
    """Start at ``peak`` and multiply the rate by a factor at each of some steps.

    Args:
        peak: rate before the first change.
        factors: step -> factor, from that step on: ``{1000: 0.1, 2000: 0.1}`` ends at a hundredth.

    Raises:
        ValueError: for a step below 0 or a factor that is negative.
    """
    check("piecewise", peak)
    for step, factor in factors.items():
        if step < 0 or not factor >= 0:
            raise ValueError(
                f"schedules.piecewise: steps and factors must be at least 0, got {{{step}: {factor}}}"
            )
    steps = sorted(factors)
    rates = [peak]
    for step in steps:
        rates.append(rates[-1] * factors[step])

    def schedule(step: int) -> float:
        return rates[bisect_right(steps, step)]

    return schedule
