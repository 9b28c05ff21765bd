"""``get_scheduler`` and its kin: every schedule as a scheduler object, for scripts that build their own.

The objects are what the Trainer builds from ``lr_scheduler_type``: it takes their rates as functions of
the step when they are given to it in ``optimizers=(optimizer, scheduler)``, so they have no state to lose.
"""

from typing import Any

from torch.optim import Optimizer

from trainer.arguments.enums import SchedulerType
from trainer.optimizers.schedulers import (
    METRIC_DRIVEN,
    GreedyLR,
    PureLambdaLR,
    make_scheduler,
    multiplier,
)

__all__ = [
    "GreedyLR",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_scheduler",
    "get_wsd_schedule",
]


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Build a schedule by its name.

    Args:
        name: a value of ``SchedulerType``.
        optimizer: whose groups' rates are scheduled.
        num_warmup_steps: updates before the peak.
        num_training_steps: updates in all.
        scheduler_specific_kwargs: further options of the schedule, see ``lr_scheduler_kwargs``.

    Raises:
        ValueError: for an unknown name, and for a number of steps that the schedule needs and is not given.
        TypeError: naming an option that the schedule does not take.
    """
    kind = SchedulerType(name)
    options = dict(scheduler_specific_kwargs or {})
    if str(kind) in METRIC_DRIVEN:
        return make_scheduler(str(kind), optimizer, 0, 0, options)
    needed = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    if str(kind) == "constant":
        needed = {}
    elif str(kind) in ("constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"):
        needed.pop("num_training_steps")
    missing = [key for key, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"get_scheduler: {kind} needs {' and '.join(missing)}")
    return _schedule(kind, optimizer, num_warmup_steps or 0, num_training_steps, options)


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> PureLambdaLR:
    """The base rate throughout."""
    return _schedule("constant", optimizer, 0, None, {}, last_epoch)


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1
) -> PureLambdaLR:
    """The base rate after a linear warm-up."""
    return _schedule("constant_with_warmup", optimizer, num_warmup_steps, None, {}, last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> PureLambdaLR:
    """Linear to 0 after a linear warm-up."""
    return _schedule("linear", optimizer, num_warmup_steps, num_training_steps, {}, last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> PureLambdaLR:
    """Waves of a cosine, half of one by default, after a linear warm-up."""
    options = {"num_cycles": num_cycles}
    return _schedule("cosine", optimizer, num_warmup_steps, num_training_steps, options, last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: int = 1,
    last_epoch: int = -1,
) -> PureLambdaLR:
    """Falling halves of a cosine, one after the other."""
    options = {"num_cycles": num_cycles}
    return _schedule(
        "cosine_with_restarts",
        optimizer,
        num_warmup_steps,
        num_training_steps,
        options,
        last_epoch,
    )


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> PureLambdaLR:
    """A power of what is left of the run, down to ``lr_end``."""
    options = {"lr_end": lr_end, "power": power}
    return _schedule(
        "polynomial", optimizer, num_warmup_steps, num_training_steps, options, last_epoch
    )


def get_inverse_sqrt_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    timescale: int | None = None,
    last_epoch: int = -1,
) -> PureLambdaLR:
    """One over the square root of the step, after a linear warm-up."""
    options = {} if timescale is None else {"timescale": timescale}
    return _schedule("inverse_sqrt", optimizer, num_warmup_steps, None, options, last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> PureLambdaLR:
    """A cosine that ends at ``min_lr``, or at ``min_lr_rate`` of the base rate."""
    options = {"num_cycles": num_cycles, "min_lr": min_lr, "min_lr_rate": min_lr_rate}
    return _schedule(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps,
        num_training_steps,
        options,
        last_epoch,
    )


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> PureLambdaLR:
    """The same with a warm-up that begins at ``warmup_lr_rate`` of the base rate."""
    options = {"num_cycles": num_cycles, "min_lr": min_lr, "min_lr_rate": min_lr_rate}
    return _schedule(
        "cosine_warmup_with_min_lr",
        optimizer,
        num_warmup_steps,
        num_training_steps,
        {**options, "warmup_lr_rate": warmup_lr_rate},
        last_epoch,
    )


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> PureLambdaLR:
    """Warm-up, a stable stretch, decay.

    Raises:
        ValueError: unless one of ``num_training_steps`` and ``num_stable_steps`` is given.
    """
    options: dict[str, Any] = {"num_decay_steps": num_decay_steps}
    if num_stable_steps is not None:
        options["num_stable_steps"] = num_stable_steps
    options |= {"warmup_type": warmup_type, "decay_type": decay_type}
    options |= {"min_lr_ratio": min_lr_ratio, "num_cycles": num_cycles}
    return _schedule(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps,
        num_training_steps,
        options,
        last_epoch,
    )


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> Any:
    """``torch.optim.lr_scheduler.ReduceLROnPlateau``, stepped with a metric."""
    return make_scheduler("reduce_lr_on_plateau", optimizer, 0, 0, kwargs)


def get_greedy_schedule(optimizer: Optimizer, **kwargs: Any) -> Any:
    """``GreedyLR``, stepped with a metric."""
    return make_scheduler("greedy", optimizer, 0, 0, kwargs)


def _schedule(
    name: str | SchedulerType,
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int | None,
    options: dict[str, Any],
    last_epoch: int = -1,
) -> PureLambdaLR:
    peak = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    factor = multiplier(str(name), peak, warmup_steps, total_steps, options)
    return PureLambdaLR(optimizer, factor, last_epoch)
