"""Checks of field values and of their combinations that need no device."""

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .enums import IntervalStrategy, SaveStrategy, SchedulerType, plain
from .fields.logs import TOKEN_COUNTS

if TYPE_CHECKING:
    from .base import TrainingArguments

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
)
_NOT_NEGATIVE = ("dataloader_num_workers", "log_digest_steps")


def validate(args: "TrainingArguments") -> None:
    """Check all fields.

    Raises:
        ValueError: A value, or a combination of values, makes no sense. The message names the fields,
            the values found, and what to do.
    """
    check_choices(args)
    check_ranges(args)
    check_steps(args)
    check_best_model(args)
    check_precision(args)
    if SchedulerType(args.lr_scheduler_type).needs_metric and args.eval_strategy == "no":
        raise ValueError(
            f"lr_scheduler_type {plain(args.lr_scheduler_type)!r} follows an evaluation metric, but "
            "eval_strategy is 'no'; set an eval strategy ('steps' or 'epoch')."
        )
    if args.dataloader_prefetch_factor is not None and args.dataloader_num_workers == 0:
        raise ValueError(
            "dataloader_prefetch_factor needs worker processes, but dataloader_num_workers is 0; "
            "set dataloader_num_workers > 0."
        )


def check_choices(args: "TrainingArguments") -> None:
    """Check each field that lists its valid values, and those of a list one by one."""
    for field in dataclasses.fields(args):
        choices = field.metadata.get("choices")
        if choices is None:
            continue
        value = getattr(args, field.name)
        if field.name == "include_num_input_tokens_seen":
            choices = TOKEN_COUNTS
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None and plain(item) not in choices:
                raise ValueError(f"{field.name}: {item!r} is not valid; choose {_among(choices)}.")


def check_ranges(args: "TrainingArguments") -> None:
    """Check numbers that have a lower bound."""
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}.")
    empty = args.torch_empty_cache_steps
    if empty is not None and not (isinstance(empty, int) and empty >= 1):
        raise ValueError(f"torch_empty_cache_steps must be a positive whole number, got {empty!r}.")
    peak = args.peak_tflops
    if peak is not None and not 0 < peak < math.inf:
        raise ValueError(
            "peak_tflops must be above 0: the dense operations per second of one device in units of 1e12 "
            f"(an H100: 989); got {peak!r}."
        )
    if args.warmup_steps is not None and not args.warmup_steps >= 0:
        raise ValueError(
            "warmup_steps must be a number of updates, or below 1 a fraction of all updates; got "
            f"{args.warmup_steps!r}."
        )


def check_steps(args: "TrainingArguments") -> None:
    """Check the numbers of steps between logs, evaluations and checkpoints."""
    if args.logging_strategy == IntervalStrategy.STEPS and not args.logging_steps:
        raise ValueError(
            "logging_strategy 'steps' needs a non-zero logging_steps, got "
            f"{args.logging_steps!r}; to log nothing, set logging_strategy to 'no'."
        )
    if args.save_strategy == SaveStrategy.STEPS and args.save_steps is None:
        raise ValueError("save_strategy 'steps' needs save_steps, got None; set save_steps.")
    for kind in ("logging", "eval", "save"):
        steps = getattr(args, f"{kind}_steps")
        if (
            getattr(args, f"{kind}_strategy") == "steps"
            and steps > 1
            and not float(steps).is_integer()
        ):
            raise ValueError(
                f"{kind}_steps must be an integer if bigger than 1 (below 1 it is a fraction of all "
                f"updates), got {steps!r}."
            )


def check_best_model(args: "TrainingArguments") -> None:
    """Check that the best model can be loaded: that it is saved whenever it is evaluated."""
    if not args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        return
    if args.eval_strategy != args.save_strategy:
        raise ValueError(
            "load_best_model_at_end needs eval_strategy and save_strategy to be the same (or "
            f"save_strategy 'best'), got {plain(args.eval_strategy)!r} and "
            f"{plain(args.save_strategy)!r}; set one to the other."
        )
    if args.eval_strategy != IntervalStrategy.STEPS:
        return
    evaluated, saved = args.eval_steps or 0, args.save_steps
    if (evaluated < 1) != (saved < 1):
        raise ValueError(
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps, which cannot be "
            f"told of a fraction and a number of updates: save_steps={saved!r}, "
            f"eval_steps={evaluated!r}. Give both as fractions or both as numbers."
        )
    if not _is_multiple(saved, evaluated):
        raise ValueError(
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps, but "
            f"{saved!r} is not a multiple of {evaluated!r}."
        )


def check_precision(args: "TrainingArguments") -> None:
    """Check that no two precisions are asked for at once."""
    for first, second in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if getattr(args, first) and getattr(args, second):
            raise ValueError(f"{first} and {second} exclude each other; set one of them to False.")
    if args.fp16 and args.on_nonfinite == "raise":
        raise ValueError(
            'on_nonfinite="raise" would stop at the first overflow of fp16, which its loss scale skips '
            'and learns from; use "ignore" or "skip" with it.'
        )


def _is_multiple(whole: float, part: float) -> bool:
    """Tell whether one number is a multiple of another, to a relative error of 1e-9."""
    quotient = whole / part
    return math.isclose(quotient, round(quotient), rel_tol=1e-9, abs_tol=1e-9)


def _among(choices: Iterable[Any]) -> str:
    return "one of " + ", ".join(repr(choice) for choice in choices)
