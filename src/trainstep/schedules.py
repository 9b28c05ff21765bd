"""Learning rates as functions of the step.

A schedule maps a zero-based step to a learning rate; ``schedule(0)`` is the rate of the first update.
The first argument of every maker is the peak. Formulas are those of the Hugging Face schedulers.
"""

import math

from trainstep.types import Schedule


def constant(peak: float, warmup_steps: int = 0) -> Schedule:
    """Return ``peak`` at every step, after a linear warm-up from 0 over ``warmup_steps`` steps."""
    _check("constant", peak, None, warmup_steps)

    def schedule(step: int) -> float:
        return peak * _warmup(step, warmup_steps)

    return schedule


def linear(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Warm up linearly from 0 to ``peak``, then go down linearly to 0 at ``total_steps``."""
    _check("linear", peak, total_steps, warmup_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * _warmup(step, warmup_steps)
        return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return schedule


def cosine(
    peak: float, total_steps: int, warmup_steps: int = 0, *, num_cycles: float = 0.5
) -> Schedule:
    """Warm up linearly, then follow a cosine to 0 at ``total_steps``.

    Args:
        peak: rate at the end of the warm-up.
        total_steps: number of updates in the whole run.
        warmup_steps: updates before the peak.
        num_cycles: waves of the cosine; one half goes from the peak to 0 once.
    """
    _check("cosine", peak, total_steps, warmup_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return peak * _warmup(step, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))

    return schedule


def _warmup(step: int, warmup_steps: int) -> float:
    return step / max(1, warmup_steps) if step < warmup_steps else 1.0


def _check(name: str, peak: float, total_steps: int | None, warmup_steps: int) -> None:
    if not peak >= 0:
        raise ValueError(f"schedules.{name}: peak must be at least 0, got {peak}")
    if warmup_steps < 0:
        raise ValueError(f"schedules.{name}: warmup_steps must be at least 0, got {warmup_steps}")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"schedules.{name}: total_steps must be at least 1, got {total_steps}")
