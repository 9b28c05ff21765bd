"""What this version cannot do yet is refused at construction, rather than ignored."""

from typing import Any

# Fields with the only values that have the effect they should.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "fp16": (False,),
    "fp16_full_eval": (False,),
    "bf16_full_eval": (False,),
    "torch_compile": (False,),
    "gradient_checkpointing": (False,),
    "auto_find_batch_size": (False,),
    "neftune_noise_alpha": (None,),
    "label_smoothing_factor": (0, 0.0),
    "use_liger_kernel": (False,),
    "include_num_input_tokens_seen": ("no", False),
    "skip_memory_metrics": (True,),
    "push_to_hub": (False,),
    "full_determinism": (False,),
    "enable_jit_checkpoint": (False,),
    "eval_use_gather_object": (False,),
    "torch_empty_cache_steps": (None,),
    "deepspeed": (None,),
    "parallelism_config": (None,),
    "async_save": (False,),
    "exact_reduction": (False,),
    "checkpoint_format": ("safe",),
    "log_digest_steps": (0,),
    "optim_target_modules": (None,),
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
    if getattr(args, "fsdp", None):
        wrong.append(f"fsdp={args.fsdp!r}")
    if args.world_size > 1:
        wrong.append(f"{args.world_size} processes")
    if wrong:
        raise NotImplementedError(
            f"not available in this version: {', '.join(wrong)}. Leave these at their defaults."
        )
