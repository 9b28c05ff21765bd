"""Schedules that stay at the peak for most of the run: warm-up, plateau, decay."""

import math
import warnings
from collections.abc import Callable

from trainstep.schedules.base import check, check_choice
from trainstep.types import Schedule

SHAPES = ("linear", "cosine", "1-sqrt")
"""Forms of the warm-up and of the decay."""


def warmup_stable_decay(
    peak: float,
    total_steps: int | None = None,
    warmup_steps: int = 0,
    *,
    decay_steps: int,
    stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise to ``peak``, stay there, and come down at the end (WSD: Hu et al., 2024).

    Args:
        peak: rate of the stable phase.
        total_steps: number of updates in the whole run; needed unless ``stable_steps`` is given.
        warmup_steps: length of the rise.
        decay_steps: length of the descent.
        stable_steps: length of the stable phase; None takes what is left of ``total_steps``. Given
            both, this one counts, with a warning.
        warmup_type: form of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        decay_type: form of the descent: one of the same.
        min_lr_ratio: where the rise starts and the descent ends, as a fraction of ``peak``.
        num_cycles: waves of a cosine descent; one half goes down once.

    Raises:
        ValueError: without ``total_steps`` and ``stable_steps``, or for an unknown form.
    """
    name = "warmup_stable_decay"
    check(name, peak, total_steps, warmup_steps)
    check_choice(name, "warmup_type", warmup_type, SHAPES)
    check_choice(name, "decay_type", decay_type, SHAPES)
    if stable_steps is None:
        if total_steps is None:
            raise ValueError(f"schedules.{name}: give total_steps or stable_steps, got neither")
        stable_steps = total_steps - warmup_steps - decay_steps
    elif total_steps is not None:
        warnings.warn(
            f"schedules.{name}: both total_steps ({total_steps}) and stable_steps ({stable_steps}) "
            "are given; stable_steps is used",
            stacklevel=2,
        )
    rise, fall = _RISES[warmup_type], _fall(decay_type, num_cycles)
    decay_start = warmup_steps + stable_steps

    def schedule(step: int) -> float:
        if step < warmup_steps:
            factor = rise(step / max(1, warmup_steps))
        elif step < decay_start:
            return peak
        elif step < decay_start + decay_steps:
            factor = fall((step - warmup_steps - stable_steps) / max(1, decay_steps))
        else:
            return peak * min_lr_ratio
        return peak * max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)

    return schedule


def trapezoidal(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    decay_steps: int,
    min_lr_ratio: float = 0.0,
) -> Schedule:
    """Rise linearly, stay, and fall linearly: ``warmup_stable_decay`` with straight lines.

    Raises:
        ValueError: if rise and fall together are longer than ``total_steps``.
    """
    check("trapezoidal", peak, total_steps, warmup_steps)
    if decay_steps < 0 or warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"schedules.trapezoidal: warmup_steps ({warmup_steps}) and decay_steps ({decay_steps}) "
            f"must fit into total_steps ({total_steps})"
        )
    return warmup_stable_decay(
        peak,
        total_steps,
        warmup_steps,
        decay_steps=decay_steps,
        decay_type="linear",
        min_lr_ratio=min_lr_ratio,
    )


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}


def _fall(kind: str, num_cycles: float) -> Callable[[float], float]:
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: (
            0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))
        ),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    return falls[kind]
