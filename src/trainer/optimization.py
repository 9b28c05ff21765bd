"""What the arguments say about an update, checked at construction, before any work is lost."""

from typing import Any

import trainstep as ts
from trainer.optimizers import check_optimizer, multiplier
from trainer.optimizers.functions import *  # noqa: F403 - scripts import schedules from here
from trainer.optimizers.schedulers import METRIC_DRIVEN


def check_choices(args: Any, *, optimizer: bool, scheduler: bool) -> None:
    """Raise what building the optimizer and the scheduler would raise.

    Args:
        args: the training arguments.
        optimizer: whether ``args.optim`` will be used.
        scheduler: whether ``args.lr_scheduler_type`` will be used.
    """
    if optimizer:
        check_optimizer(args)
    name = str(args.lr_scheduler_type)
    if scheduler and name not in METRIC_DRIVEN:
        steps = max(args.max_steps, 1)
        options = dict(args.lr_scheduler_kwargs or {})
        multiplier(name, args.learning_rate, args.get_warmup_steps(steps), steps, options)


def make_transforms(args: Any) -> tuple[ts.Transform, ...]:
    """Build the gradient transforms: clipping, unless ``max_grad_norm`` is 0 or None."""
    if not args.max_grad_norm or args.max_grad_norm <= 0:
        return ()
    return (ts.transforms.clip_by_global_norm(args.max_grad_norm),)
