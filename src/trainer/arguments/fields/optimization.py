"""Fields on the optimizer and the learning-rate schedule."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass
from typing import Any

from ..enums import OptimizerNames, SchedulerType
from .option import option


@dataclass(repr=False)
class OptimizerFields:
    """Which optimizer, which schedule, with which numbers."""

    learning_rate: float = option(5e-5, "Peak learning rate, which the schedule scales.")
    lr_scheduler_type: SchedulerType | str = option("linear", "Learning-rate schedule.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = option(
        None,
        "Options of the schedule, such as num_cycles or min_lr: a dict, JSON text or JSON file.",
    )
    warmup_steps: float = option(
        0, "Warm-up length: a number of updates, or below 1 a fraction of all updates, rounded up."
    )
    optim: OptimizerNames | str = option("adamw_torch_fused", "Optimizer to build.")
    optim_args: str | None = option(
        None, "Further options of the optimizer as 'key=value,key=value'."
    )
    weight_decay: float = option(
        0.0, "Weight decay of all parameters but biases and normalisation weights."
    )
    adam_beta1: float = option(0.9, "Decay of the first moment in optimizers of the Adam family.")
    adam_beta2: float = option(
        0.999, "Decay of the second moment in optimizers of the Adam family."
    )
    adam_epsilon: float = option(
        1e-8, "Term that keeps the denominator of the Adam family away from zero."
    )
    optim_target_modules: str | list[str] | None = option(
        None,
        "Linear modules that GaLore and APOLLO project: names, a regular expression, or 'all-linear'.",
    )
    max_grad_norm: float = option(
        1.0, "Clip gradients to this global norm before each update; 0 measures without clipping."
    )
    warmup_ratio: float | None = option(
        None,
        "Former name of a fractional warmup_steps, to which its value is moved with a warning.",
    )
