"""Fill in and convert field values, in the order that later steps rely on.

Every function here can run again on its own result and then changes nothing: setters rely on it.
"""

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

from .accelerator_config import as_accelerator_config
from .convert import as_mapping, as_scalar, json_object, scalar_type
from .deepspeed import announce
from .enums import (
    DebugOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
    plain,
)
from .fields.option import OWN
from .fsdp import check_fsdp, fsdp_details, fsdp_options
from .reporting import resolve_report_to
from .serialization import is_secret, placeholder

if TYPE_CHECKING:
    from .base import TrainingArguments

logger = logging.getLogger(__name__)

_LIBRARY = __name__.partition(".")[0]
_MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "liger_kernel_config")
_JSON_TEXTS = ("accelerator_config", "parallelism_config", "deepspeed")


def read_values(args: "TrainingArguments") -> None:
    """Read text as numbers, booleans, JSON and paths, and move the values of former fields."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if is_secret(field.name) and value == placeholder(field.name):
            setattr(args, field.name, None)
        kind = scalar_type(field.type) if OWN in field.metadata else None
        if kind is not None:
            setattr(args, field.name, as_scalar(field.name, kind, value))
    for name in _MAPPINGS:
        setattr(args, name, as_mapping(name, getattr(args, name)))
    for name in {*_JSON_TEXTS, *args._VALID_DICT_FIELDS} - {*_MAPPINGS, "fsdp_config"}:
        value = getattr(args, name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            setattr(args, name, _json_text(name, value))
    if args.output_dir is None:
        args.output_dir = "trainer_output"
        logger.info("output_dir is not given: using %r.", args.output_dir)
    if not isinstance(args.output_dir, str | os.PathLike):
        raise TypeError(f"output_dir must be a path, got {args.output_dir!r}.")
    args.output_dir = os.path.expanduser(args.output_dir)
    if args.disable_tqdm is None:
        args.disable_tqdm = logging.getLogger(_LIBRARY).getEffectiveLevel() > logging.WARNING
    if args.eval_delay is None:
        args.eval_delay = 0
    _move_former_fields(args)


def convert_enums(args: "TrainingArguments") -> None:
    """Turn names into enum members.

    Raises:
        ValueError: A name is unknown; the message starts with the field and lists the valid names.
    """
    enums = {
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
    }
    for name, enum in enums.items():
        try:
            setattr(args, name, enum(getattr(args, name)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    args.debug = _debug_options(args.debug)
    tokens = args.include_num_input_tokens_seen
    if isinstance(tokens, bool):
        args.include_num_input_tokens_seen = "all" if tokens else "no"


def derive_values(args: "TrainingArguments") -> None:
    """Derive what is left out: evaluation steps, the tracked metric, trackers, the compiler.

    Raises:
        ValueError: Evaluation by steps has no number of steps, or a tracker is unknown.
    """
    if args.eval_strategy != IntervalStrategy.NO:
        args.do_eval = True
    if args.eval_strategy == IntervalStrategy.STEPS and not args.eval_steps:
        if not args.logging_steps:
            raise ValueError(
                "eval_strategy 'steps' needs eval_steps or logging_steps; both are "
                f"{args.eval_steps!r} and {args.logging_steps!r}. Set eval_steps."
            )
        logger.info("eval_steps is not given: using logging_steps=%s.", args.logging_steps)
        args.eval_steps = args.logging_steps
    for name in ("logging_steps", "eval_steps", "save_steps"):
        steps = getattr(args, name)
        if steps is not None and steps > 1 and float(steps).is_integer():
            setattr(args, name, int(steps))
    follows_metric = (
        args.load_best_model_at_end or SchedulerType(args.lr_scheduler_type).needs_metric
    )
    if follows_metric and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.greater_is_better is None and args.metric_for_best_model is not None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    args.report_to = resolve_report_to(args.report_to)
    if args.torch_compile_mode is not None or args.torch_compile_backend is not None:
        args.torch_compile = True
    if args.torch_compile and args.torch_compile_backend is None:
        args.torch_compile_backend = "inductor"


def build_configs(args: "TrainingArguments") -> None:
    """Build the configuration objects: accelerate's, FSDP's, and DeepSpeed's for transformers.

    Raises:
        NotImplementedError, TypeError, ValueError: See :func:`as_accelerator_config`.
        ValueError: See :mod:`trainer.arguments.fsdp`.
    """
    config = as_accelerator_config(args.accelerator_config)
    args.accelerator_config = config  # type: ignore[assignment]
    _take_accumulation(args, (config.gradient_accumulation_kwargs or {}).get("num_steps"))
    if args.use_cpu:
        args.dataloader_pin_memory = False
    if config.non_blocking and not args.dataloader_pin_memory:
        logger.warning(
            "accelerator_config: non_blocking has no effect with dataloader_pin_memory=False."
        )
    args.fsdp = fsdp_options(args.fsdp)
    args.fsdp_config = fsdp_details(args.fsdp_config)
    check_fsdp(args.fsdp, args.fsdp_config, args.gradient_checkpointing)
    args.hf_deepspeed_config = announce(args)


def _take_accumulation(args: "TrainingArguments", steps: int | None) -> None:
    if steps is None or steps == args.gradient_accumulation_steps:
        return
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} contradicts "
            f"num_steps={steps} in accelerator_config's gradient_accumulation_kwargs; give one of them."
        )
    args.gradient_accumulation_steps = steps


def _json_text(name: str, text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def _move_former_fields(args: "TrainingArguments") -> None:
    if args.warmup_ratio is not None:
        logger.warning("warmup_ratio is deprecated; give the fraction as warmup_steps.")
        # It is cleared, so that changing ``warmup_steps`` of a copy is not undone by it.
        args.warmup_steps, args.warmup_ratio = args.warmup_ratio, None
    if args.logging_dir is not None:
        logger.warning(
            "logging_dir is deprecated; set the environment variable TENSORBOARD_LOGGING_DIR."
        )


def _debug_options(value: Any) -> list[DebugOption]:
    words = value.split() if isinstance(value, str) else list(value or ())
    try:
        return [DebugOption(word) for item in words for word in str(plain(item)).split()]
    except ValueError as error:
        raise ValueError(f"debug: {error}") from None
