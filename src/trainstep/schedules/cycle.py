"""The one-cycle policy."""

import math

from trainstep.schedules.base import check, check_choice
from trainstep.types import Schedule


def one_cycle(
    peak: float,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Rise from ``peak / div_factor`` to ``peak`` and fall far below (Smith and Topin, 2018).

    The rates are those of ``torch.optim.lr_scheduler.OneCycleLR`` at steps 0 to ``total_steps - 1``;
    afterwards the last one stays. Momentum is not cycled.

    Args:
        peak: the highest rate.
        total_steps: number of updates in the whole run.
        pct_start: fraction of the run that rises.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        div_factor: the run starts at ``peak / div_factor``.
        final_div_factor: and ends at the start divided by this.
        three_phase: fall to the start as slowly as it rose, and only then further.

    Raises:
        ValueError: for an unknown strategy, ``pct_start`` outside [0, 1] or a factor not above 0.
    """
    check("one_cycle", peak, total_steps)
    check_choice("one_cycle", "anneal_strategy", anneal_strategy, ("cos", "linear"))
    if not 0 <= pct_start <= 1:
        raise ValueError(f"schedules.one_cycle: pct_start must be in [0, 1], got {pct_start}")
    for what, factor in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        if not factor > 0:
            raise ValueError(f"schedules.one_cycle: {what} must be above 0, got {factor}")
    first = peak / div_factor
    last = first / final_div_factor
    rise_end, end = float(pct_start * total_steps) - 1, float(total_steps - 1)
    phases = [(rise_end, first, peak), (end, peak, last)]
    if three_phase:
        fall_end = float(2 * pct_start * total_steps) - 2
        phases = [(rise_end, first, peak), (fall_end, peak, first), (end, first, last)]
    anneal = _cosine if anneal_strategy == "cos" else _line

    def schedule(step: int) -> float:
        if step >= total_steps:
            return last
        start = 0.0
        for stop, low, high in phases[:-1]:
            if step <= stop:
                return anneal(low, high, _part(step, start, stop))
            start = stop
        stop, low, high = phases[-1]
        return anneal(low, high, _part(step, start, stop))

    return schedule


def _part(step: int, start: float, stop: float) -> float:
    # A phase without length is over at once.
    return 1.0 if stop == start else (step - start) / (stop - start)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1)


def _line(start: float, end: float, part: float) -> float:
    return (end - start) * part + start
