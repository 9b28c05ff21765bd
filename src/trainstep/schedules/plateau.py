"""``reduce_on_plateau``: lower the rate when a metric stops improving, as a pure reducer."""

import math
from typing import Literal, SupportsFloat

from attrs import frozen

from trainstep.schedules.base import check, check_choice


@frozen
class PlateauState:
    """What ``reduce_on_plateau`` remembers; numbers only, so ``attrs.asdict`` of it is JSON.

    Attributes:
        lr: the learning rate now.
        best: best metric so far; None before the first improvement.
        bad: evaluations in a row without improvement.
        cooldown: evaluations left in which none counts as bad.
    """

    lr: float
    best: float | None = None
    bad: int = 0
    cooldown: int = 0


@frozen
class Plateau:
    """A pure reducer over a metric; see ``reduce_on_plateau``."""

    lr: float
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    def init(self) -> PlateauState:
        """Return the state before the first evaluation."""
        return PlateauState(self.lr)

    def update(self, state: PlateauState, metric: SupportsFloat) -> PlateauState:
        """Return the state after an evaluation; ``state.lr`` is the rate from now on.

        A metric that is NaN counts as no improvement. A tensor is read to the host.
        """
        current = float(metric)
        better = improves(current, state.best, self.mode, self.threshold, self.threshold_mode)
        best = current if better else state.best
        bad = 0 if better or state.cooldown > 0 else state.bad + 1
        cooldown = max(state.cooldown - 1, 0)
        if bad <= self.patience:
            return PlateauState(state.lr, best, bad, cooldown)
        lr = max(state.lr * self.factor, self.min_lr)
        if not state.lr - lr > self.eps:
            lr = state.lr
        return PlateauState(lr, best, 0, self.cooldown)


def reduce_on_plateau(
    lr: float,
    *,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> Plateau:
    """Multiply the rate by ``factor`` after more than ``patience`` evaluations without improvement.

    The rates are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``. In use::

        plateau = schedules.reduce_on_plateau(0.1, patience=2)
        memory = plateau.init()
        memory = plateau.update(memory, eval_loss)        # after each evaluation
        step = make_step(loss, optimizer, schedule=lambda _: memory.lr)

    Args:
        lr: the rate at the start.
        mode: whether a smaller (``"min"``) or larger (``"max"``) metric is better.
        factor: what the rate is multiplied by, below 1.
        patience: evaluations without improvement that are put up with.
        threshold: how much better counts as an improvement.
        threshold_mode: ``"rel"``: as a fraction of the best; ``"abs"``: as a difference.
        cooldown: evaluations after a reduction in which none counts as bad.
        min_lr: the rate never goes below it.
        eps: a smaller change of the rate is not made.

    Raises:
        ValueError: for ``factor`` not in (0, 1), an unknown mode, or ``min_lr`` above ``lr``.
    """
    check_metric_options("reduce_on_plateau", lr, mode, factor, threshold_mode)
    if min_lr > lr:
        raise ValueError(
            f"schedules.reduce_on_plateau: min_lr ({min_lr}) is above lr ({lr}), so the rate could "
            "never be reduced; pass a smaller min_lr"
        )
    return Plateau(
        lr, mode, factor, patience, threshold, threshold_mode, cooldown, float(min_lr), eps
    )


def improves(
    current: float, best: float | None, mode: str, threshold: float, threshold_mode: str
) -> bool:
    """Tell whether a metric is better than the best one by more than the threshold."""
    sign = -1.0 if mode == "min" else 1.0
    if best is None:
        best = -sign * math.inf
    if threshold_mode == "rel":
        bound = best * (1.0 + sign * threshold)
    else:
        bound = best + sign * threshold
    return current > bound if mode == "max" else current < bound


def check_metric_options(
    name: str, lr: float, mode: str, factor: float, threshold_mode: str
) -> None:
    """Raise ValueError for options that no metric-driven schedule takes."""
    check(name, lr)
    check_choice(name, "mode", mode, ("min", "max"))
    check_choice(name, "threshold_mode", threshold_mode, ("rel", "abs"))
    if not 0 < factor < 1:
        raise ValueError(f"schedules.{name}: factor must be above 0 and below 1, got {factor}")
