"""What the schedules share: the linear warm-up and the checks of their arguments."""

from collections.abc import Sequence


def ramp(step: int, warmup_steps: int) -> float:
    """Return the factor of a linear warm-up: ``step / warmup_steps``, then 1."""
    return step / max(1, warmup_steps) if step < warmup_steps else 1.0


def check(name: str, peak: float, total_steps: int | None = None, warmup_steps: int = 0) -> None:
    """Raise ValueError for a negative peak or warm-up, or a run of less than one step."""
    if not peak >= 0:
        raise ValueError(f"schedules.{name}: peak must be at least 0, got {peak}")
    if warmup_steps < 0:
        raise ValueError(f"schedules.{name}: warmup_steps must be at least 0, got {warmup_steps}")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"schedules.{name}: total_steps must be at least 1, got {total_steps}")


def check_choice(name: str, what: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, listing the valid choices, unless ``value`` is one of them."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"schedules.{name}: {what} must be one of {listed}; got {value!r}")
