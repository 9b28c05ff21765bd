"""Schedulers: torch's ``LambdaLR`` to look at, the core's schedules as the formulas behind it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import trainstep as ts

# How upstream names the core's arguments; what is not here has one name in both.
_RENAMED = {
    "num_warmup_steps": "warmup_steps",
    "num_training_steps": "total_steps",
    "num_decay_steps": "decay_steps",
    "num_stable_steps": "stable_steps",
}

_MAKERS: dict[str, Callable[..., Callable[[int], float]]] = {
    "linear": ts.schedules.linear,
    "cosine": ts.schedules.cosine,
    "cosine_with_restarts": ts.schedules.cosine_with_restarts,
    "polynomial": ts.schedules.polynomial,
    "constant": ts.schedules.constant,
    "constant_with_warmup": ts.schedules.constant,
    "inverse_sqrt": ts.schedules.inverse_sqrt,
    "cosine_with_min_lr": ts.schedules.cosine_with_min_lr,
    "cosine_warmup_with_min_lr": ts.schedules.cosine_warmup_with_min_lr,
    "warmup_stable_decay": ts.schedules.warmup_stable_decay,
}

METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")


class PureLambdaLR(LambdaLR):
    """A ``LambdaLR`` whose multiplier is a function of the step alone.

    The Trainer recognises it and computes rates as functions of its step; then ``step()`` is not
    needed, and there is no state to lose.
    """


def make_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    options: dict[str, Any],
) -> Any:
    """Build the scheduler that ``lr_scheduler_type`` names.

    Args:
        name: a value of ``SchedulerType``.
        optimizer: whose groups' rates are scheduled.
        warmup_steps: updates before the peak.
        total_steps: updates in the run; 0 gives rates of 0.
        options: ``lr_scheduler_kwargs``.

    Raises:
        TypeError: naming an option that the schedule does not take.
        ValueError: for option values that the schedule refuses.
    """
    if name in METRIC_DRIVEN:
        return _metric_driven(name, optimizer, options)
    peak = float(optimizer.param_groups[0]["lr"])
    return PureLambdaLR(optimizer, multiplier(name, peak, warmup_steps, total_steps, options))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate; one that is a tensor is written to, since compiled steps hold it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def multiplier(
    name: str, peak: float, warmup_steps: int, total_steps: int | None, options: dict[str, Any]
) -> Callable[[int], float]:
    """Return the factor of the base rate as a function of the step; arguments as above."""
    if (
        total_steps == 0
    ):  # the loop looks at the limit after an update: that one must change nothing
        return lambda step: 0.0
    keywords: dict[str, Any] = {}
    if name != "constant":
        keywords["num_warmup_steps"] = warmup_steps
    if "total_steps" in inspect.signature(_MAKERS[name]).parameters:
        keywords["num_training_steps"] = total_steps
    if name not in ("constant", "constant_with_warmup"):
        _check_options(name, options)
        keywords |= options
    if name == "polynomial":
        keywords = {"lr_end": 1e-7, "power": 1.0, **keywords, "lr_init": peak}
    elif keywords.get("min_lr") is not None and keywords.get("min_lr_rate") is None:
        keywords["min_lr_rate"] = keywords.pop("min_lr") / peak
    # A partial, because scripts look at the settings in its keywords.
    factor: Any = partial(_FACTORS[name], **keywords)
    factor(0)  # bad values are refused here, not in the middle of a run
    return factor


def rate_function(scheduler: Any) -> Callable[[int], list[float]] | None:
    """Return ``step -> rate of each group`` for a scheduler that is a function of the step, else None."""
    if type(scheduler) is not PureLambdaLR:
        return None
    factors = [_compiled(factor) for factor in scheduler.lr_lambdas]
    # Rates that are tensors (torchao's) are multiplied as such, with the rounding of their type.
    bases = scheduler.base_lrs
    return lambda step: [
        float(base * factor(step)) for base, factor in zip(bases, factors, strict=True)
    ]


def _compiled(factor: Any) -> Callable[[int], float]:
    # Without this the formula would be looked up and checked anew at every step.
    if isinstance(factor, partial):
        name = getattr(factor.func, "__name__", "")
        if _FACTORS.get(name) is factor.func:
            return _formula(name, factor.keywords)
    return factor


def _factor_of(name: str) -> Callable[..., float]:
    def factor(step: int, **keywords: Any) -> float:
        return _formula(name, keywords)(step)

    factor.__name__ = name
    return factor


def _formula(name: str, keywords: dict[str, Any]) -> Callable[[int], float]:
    options = {_RENAMED.get(key, key): value for key, value in keywords.items()}
    if name == "polynomial":  # its end is absolute, and this is a factor of the peak
        peak = options.pop("lr_init")
        options["lr_end"] = options["lr_end"] / peak
    if name == "warmup_stable_decay" and options.get("stable_steps") is not None:
        options["total_steps"] = None
    return _MAKERS[name](1.0, **options)


_FACTORS = {name: _factor_of(name) for name in _MAKERS}


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = inspect.signature(_MAKERS[name]).parameters
    for option in options:
        if _RENAMED.get(option, option) not in known:
            back = {ours: theirs for theirs, ours in _RENAMED.items()}
            names = [back.get(k, k) for k in known if k != "peak"]
            raise TypeError(
                f"lr_scheduler_kwargs: {name} does not take {option!r}; it takes {', '.join(names)}"
            )


def _metric_driven(name: str, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> Any:
    if name == "reduce_lr_on_plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    return GreedyLR(optimizer, **options)


class GreedyLR:
    """The core's ``schedules.greedy`` as a scheduler object, stepped with a metric.

    Args:
        optimizer: whose groups' rates are set, all alike.
        options: arguments of ``trainstep.schedules.greedy``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.optimizer = optimizer
        self.rule = ts.schedules.greedy(float(optimizer.param_groups[0]["lr"]), **options)
        self.state = self.rule.init()

    def step(self, metrics: float) -> None:
        """Take in the metric of an evaluation."""
        self.state = self.rule.update(self.state, metrics)
        for group in self.optimizer.param_groups:
            set_rate(group, self.state.lr)

    def get_last_lr(self) -> list[float]:
        """Return the rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        import attrs

        return attrs.asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self.state = type(self.state)(**state)
        for group in self.optimizer.param_groups:
            set_rate(group, self.state.lr)
