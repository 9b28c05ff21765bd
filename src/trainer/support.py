"""What this version cannot do yet is refused at construction, rather than ignored."""

import dataclasses
import logging
from typing import Any

from trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments

logger = logging.getLogger(__name__)

# Fields with the only values that have the effect they should.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False,),
    "parallelism_config": (None,),
}


def refuse_unsupported(args: Any) -> None:
    """Raise NotImplementedError listing the arguments whose values would have no effect."""
    wrong = [
        f"{name}={getattr(args, name)!r}"
        for name, allowed in _SUPPORTED.items()
        if getattr(args, name, allowed[0]) not in allowed
    ]
    if getattr(args, "report_to", None):
        wrong.append(f"report_to={args.report_to!r}")
    if "tpu_metrics_debug" in getattr(args, "debug", ()):
        wrong.append(f"debug={[str(option) for option in args.debug]}")
    wrong += _with_processes(args) if args.world_size > 1 else []
    if wrong:
        raise NotImplementedError(
            f"not available in this version: {', '.join(wrong)}. Leave these at their defaults."
        )


def _with_processes(args: Any) -> list[str]:
    """Return what there is not with several processes."""
    count = f"with {args.world_size} processes"
    kind = str(getattr(args.distributed_state.distributed_type, "value", ""))
    found = [kind] if kind in ("MEGATRON_LM", "XLA", "TP") else []
    if args.auto_find_batch_size:
        found.append(f"auto_find_batch_size=True {count}")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        found.append(f"accelerator_config: dispatch_batches=True {count}")
    return found


# Methods of the Hugging Face Trainer that nothing here calls: defining one would have no effect.
_UNUSED_HOOKS = (
    "_inner_training_loop",
    "_maybe_log_save_evaluate",
    "create_model_card",
    "hyperparameter_search",
    "init_hf_repo",
    "push_to_hub",
)


def refuse_unused_hooks(trainer: Any) -> None:
    """Raise NotImplementedError if a subclass defines a method that would never be called."""
    unused = [name for name in _UNUSED_HOOKS if hasattr(type(trainer), name)]
    if unused:
        raise NotImplementedError(
            f"{type(trainer).__name__} overrides {', '.join(unused)}, which this version does not "
            "call, so that would have no effect"
        )


def own_arguments(args: Any) -> TrainingArguments:
    """Return ``args``, or what they say as our ``TrainingArguments`` if they are transformers' own.

    Raises:
        TypeError: if they are neither.
    """
    if isinstance(args, TrainingArguments):
        return args
    if not (hasattr(args, "to_dict") and hasattr(args, "per_device_train_batch_size")):
        raise TypeError(
            f"args must be a trainer.TrainingArguments, got {type(args).__name__}; "
            "from trainer import TrainingArguments"
        )
    sequence = hasattr(args, "predict_with_generate")
    kind = Seq2SeqTrainingArguments if sequence else TrainingArguments
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    values = {name: value for name, value in args.to_dict().items() if name in known}
    if "hub_token" in values:  # masked in the dict
        values["hub_token"] = args.hub_token
    logger.info("The arguments given are transformers'; they are used as trainer.%s", kind.__name__)
    return kind(**values)
