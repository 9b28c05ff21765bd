"""What this version cannot do yet is refused at construction, rather than ignored."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.distributed import fsdp_plan

logger = logging.getLogger(__name__)

# Fields with the only values that have the effect they should.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False,),
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


# What the Hugging Face Trainer calls in a training and nothing here does: defining one would have no
# effect. (Those that only uploads and searches call are not among them, since these are refused.)
_UNUSED_HOOKS = (
    "_clip_grad_norm",
    "_finalize_training",
    "_get_dataloader",
    "_get_grad_norm",
    "_get_learning_rate",
    "_get_num_items_in_batch",
    "_init_training_state",
    "_inner_training_loop",
    "_issue_warnings_after_load",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_maybe_log_save_evaluate",
    "_prepare_context_parallel_inputs",
    "_prepare_for_training",
    "_run_epoch",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_save_scaler",
    "_track_num_input_tokens",
    "_update_auto_batch_size",
    "_validate_args",
)
UPLOADING = (
    "_finish_current_push",
    "_push_from_checkpoint",
    "create_model_card",
    "init_hf_repo",
    "push_to_hub",
)
SEARCHING = (
    "_hp_search_setup",
    "_report_to_hp_search",
    "_tune_save_checkpoint",
    "hyperparameter_search",
)
"""Methods that only uploads and searches call, which are not available: a subclass may have them."""


def why_missing(name: str) -> str | None:
    """Say why a public method of the Hugging Face Trainer is not there; None for any other name."""
    if name.startswith("_"):
        return None
    if name == "create_model_card":
        return "writing model cards is not available in this version. Leave the call out"
    if name in UPLOADING:
        return (
            "uploading to the Hub is not available in this version. Save with save_model(folder), and "
            "upload that with huggingface_hub's upload_folder"
        )
    if name in SEARCHING:
        return (
            "hyperparameter search is not available in this version. Let a search library call a function "
            "that makes a Trainer and trains it"
        )
    return None


def refuse_unused_hooks(trainer: Any) -> None:
    """Raise NotImplementedError if a subclass defines a method that these arguments never call."""
    unused = [name for name in _UNUSED_HOOKS if hasattr(type(trainer), name)]
    if unused:
        raise NotImplementedError(
            f"{type(trainer).__name__} overrides {', '.join(unused)}, which this version does not "
            "call, so that would have no effect"
        )
    args = trainer.args
    saves = str(args.save_strategy) != "no" or args.enable_jit_checkpoint
    refuse_bypassed_hooks(trainer, saves=saves)


def refuse_bypassed_hooks(trainer: Any, *, saves: bool) -> None:
    """Raise NotImplementedError if a subclass overrides what distributed weights do not go through.

    Args:
        trainer: the trainer, with ``args`` and ``_zero``.
        saves: whether there are checkpoints.
    """
    if bypassed := list(_bypassed(trainer, saves)):
        raise NotImplementedError(f"{type(trainer).__name__} overrides " + "; and ".join(bypassed))


def _bypassed(trainer: Any, saves: bool) -> Iterator[str]:
    args, zero, overrides = trainer.args, trainer._zero, trainer._overrides
    sharded = zero is None and fsdp_plan.wanted(args)
    if zero is None and not sharded:
        return
    name = "fsdp" if sharded else "deepspeed"
    if overrides("_load_from_checkpoint"):
        yield (
            f"_load_from_checkpoint, which {name} does not call, because every process reads its parts of "
            "the weights: load them into the model before Trainer has it"
        )
    if saves and overrides("save_model"):
        yield (
            f"save_model, which checkpoints are not written through with {name}: override _save, or set "
            'save_strategy="no" and call save_model yourself'
        )
    if not overrides("_save"):
        return
    if sharded and saves and fsdp_plan.in_parts(args):
        yield (
            "_save, which writes whole weights, and checkpoints hold parts of them: set state_dict_type to "
            "FULL_STATE_DICT in fsdp_config"
        )
    if zero is not None and not zero.gathers:
        yield (
            "_save, which writes whole weights, and with stage 3 these stay in parts: set "
            "stage3_gather_16bit_weights_on_model_save: true in zero_optimization"
        )


def refuse_tensor_parallel(model: Any) -> None:
    """Raise NotImplementedError for a model whose layers are shared by processes (a ``tp_plan``)."""
    size = int(getattr(model, "tp_size", None) or 1)
    if size > 1:
        raise NotImplementedError(
            f"{type(model).__name__} was loaded for tensor parallelism among {size} processes, which is "
            "not available in this version: every process works on samples of its own. Load it without "
            "tp_plan; fsdp distributes it."
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
    own = kind(**values)
    for field in dataclasses.fields(args):  # those that a subclass of a script has added
        if field.name not in known and not hasattr(own, field.name):
            setattr(own, field.name, getattr(args, field.name))
    return own
