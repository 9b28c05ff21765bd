"""``greedy``: raise the rate while a metric improves, lower it while it does not (GreedyLR)."""

from collections.abc import Iterable
from typing import Literal, SupportsFloat

from attrs import evolve, field, frozen

from trainstep.schedules.plateau import check_metric_options, improves

_FLOOR = 1e-3
"""The reference's lowest rate, which is above many initial ones."""


def _as_tuple(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(values)  # JSON gives lists back


@frozen
class GreedyState:
    """What ``greedy`` remembers; numbers only, so ``attrs.asdict`` of it is JSON.

    Attributes:
        lr: the learning rate now.
        best: best (smoothed) metric so far; None before the first improvement.
        bad: evaluations in a row without improvement.
        good: evaluations in a row with improvement.
        cooldown: evaluations left that do not count, after a reduction.
        warmup: evaluations left that do not count, after a rise.
        floored: reductions that ended on the floor since the last rise.
        window: the last metrics, if they are smoothed.
        total: their sum, kept running.
    """

    lr: float
    best: float | None = None
    bad: int = 0
    good: int = 0
    cooldown: int = 0
    warmup: int = 0
    floored: int = 0
    window: tuple[float, ...] = field(default=(), converter=_as_tuple)
    total: float = 0.0


@frozen
class Greedy:
    """A pure reducer over a metric; see ``greedy``."""

    lr: float
    mode: Literal["min", "max"]
    factor: float
    patience: int
    threshold: float
    threshold_mode: Literal["rel", "abs"]
    cooldown: int
    warmup: int
    min_lr: float
    max_lr: float
    eps: float
    smooth: bool
    window_size: int
    reset_start: int

    def init(self) -> GreedyState:
        """Return the state before the first evaluation."""
        return GreedyState(self.lr)

    def update(self, state: GreedyState, metric: SupportsFloat) -> GreedyState:
        """Return the state after an evaluation; ``state.lr`` is the rate from now on."""
        current = float(metric)
        if self.smooth:
            state = self._push(state, current)
            current = state.total / len(state.window)
        if state.cooldown > 0:
            return evolve(state, cooldown=state.cooldown - 1, bad=0, good=0)
        if state.warmup > 0:
            return evolve(state, warmup=state.warmup - 1, bad=0, good=0)
        if improves(current, state.best, self.mode, self.threshold, self.threshold_mode):
            state = evolve(state, best=current, bad=0, good=state.good + 1)
        else:
            state = evolve(state, bad=state.bad + 1, good=0)
        if state.good > self.patience:
            return self._raise(state)
        return self._lower(state) if state.bad > self.patience else state

    def _push(self, state: GreedyState, value: float) -> GreedyState:
        window, total = (*state.window, value), state.total + value
        if len(window) > self.window_size:
            window, total = window[1:], total - window[0]
        return evolve(state, window=window, total=total)

    def _raise(self, state: GreedyState) -> GreedyState:
        lr = min(state.lr / self.factor, self.max_lr)
        lr = lr if lr - state.lr > self.eps else state.lr
        return evolve(state, lr=lr, good=0, warmup=self.warmup, floored=0)

    def _lower(self, state: GreedyState) -> GreedyState:
        lr = max(state.lr * self.factor, self.min_lr)
        lr = lr if state.lr - lr > self.eps else state.lr
        floored = state.floored + (lr <= self.min_lr)
        if lr <= self.min_lr and floored >= self.reset_start:
            # A fresh start; only the pause after this reduction is still observed.
            return GreedyState(self.lr, cooldown=self.cooldown)
        return evolve(state, lr=lr, bad=0, cooldown=self.cooldown, floored=floored)


def greedy(
    lr: float,
    *,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.95,
    patience: int = 10,
    threshold: float = 1e-6,
    threshold_mode: Literal["rel", "abs"] = "abs",
    cooldown: int = 0,
    warmup: int = 0,
    min_lr: float | None = None,
    max_lr: float = 1.0,
    eps: float | None = None,
    smooth: bool = False,
    window_size: int = 50,
    reset_start: int = 500,
) -> Greedy:
    """Follow a metric in both directions (GreedyLR, arXiv 2512.14527).

    After more than ``patience`` improvements in a row the rate becomes ``lr / factor``, after more than
    ``patience`` evaluations without one ``lr * factor``. The rates are those of the Hugging Face
    scheduler, except where its defaults could not lower a rate at all.

    Args:
        lr: the rate at the start.
        mode: whether a smaller (``"min"``) or larger (``"max"``) metric is better.
        factor: what the rate is multiplied by or divided by, below 1.
        patience: evaluations in a row that are waited for.
        threshold: how much better counts as an improvement.
        threshold_mode: ``"rel"``: as a fraction of the best; ``"abs"``: as a difference.
        cooldown: evaluations after a reduction that do not count.
        warmup: evaluations after a rise that do not count.
        min_lr: lowest rate. None is 1e-3, and ``lr / 100`` for rates at or below 1e-3, which could
            otherwise never be lowered.
        max_lr: highest rate.
        eps: a smaller change of the rate is not made. None is 1e-8, and ``1e-5 * lr`` for rates at
            or below 1e-3.
        smooth: compare the mean of the last ``window_size`` metrics instead of the metric.
        window_size: length of that mean.
        reset_start: after this many reductions at the floor, start again from ``lr``.

    Raises:
        ValueError: for ``factor`` not in (0, 1), an unknown mode, or a window below 1.
    """
    check_metric_options("greedy", lr, mode, factor, threshold_mode)
    if window_size < 1:
        raise ValueError(f"schedules.greedy: window_size must be at least 1, got {window_size}")
    small = lr <= _FLOOR
    if min_lr is None:
        min_lr = lr / 100 if small else _FLOOR
    if eps is None:
        eps = 1e-5 * lr if small else 1e-8
    return Greedy(
        lr=lr,
        mode=mode,
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        warmup=warmup,
        min_lr=min_lr,
        max_lr=max_lr,
        eps=eps,
        smooth=smooth,
        window_size=window_size,
        reset_start=reset_start,
    )
