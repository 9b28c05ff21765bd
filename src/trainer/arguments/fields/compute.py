"""Fields on precision, speed and memory, and on debugging."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass
from typing import Any

from ..enums import DebugOption
from .option import option


@dataclass(repr=False)
class ComputeFields:
    """How the arithmetic is carried out."""

    bf16: bool = option(False, "Train with bfloat16 mixed precision.")
    fp16: bool = option(
        False, "Train with float16 mixed precision and loss scaling. Excludes bf16."
    )
    bf16_full_eval: bool = option(
        False, "Evaluate and predict, outside of training, with all weights in bfloat16."
    )
    fp16_full_eval: bool = option(
        False,
        "Evaluate and predict, outside of training, with all weights in float16. Excludes "
        "bf16_full_eval.",
    )
    tf32: bool | None = option(
        None, "Switch TensorFloat-32 matrix products on or off; None leaves torch's setting."
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass, which saves memory and costs time."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None,
        "Options of gradient checkpointing, such as use_reentrant: a dict, JSON text or JSON file.",
    )
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    torch_compile_backend: str | None = option(
        None, "Backend of torch.compile; giving one switches torch_compile on. Left out: inductor."
    )
    torch_compile_mode: str | None = option(
        None, "Mode of torch.compile, such as max-autotune; giving one switches torch_compile on."
    )
    use_liger_kernel: bool = option(
        False, "Patch supported models with Liger kernels (needs liger-kernel)."
    )
    liger_kernel_config: dict[str, bool] | None = option(
        None, "Switches of single Liger kernels, such as rope or swiglu, as a dict or JSON text."
    )
    use_cache: bool = option(False, "Value that the Trainer writes to model.config.use_cache.")
    torch_empty_cache_steps: int | None = option(
        None, "Empty the device's allocator cache whenever the step is a multiple of this."
    )
    auto_find_batch_size: bool = option(
        False, "After running out of memory, start again with nine tenths of the batch size."
    )
    full_determinism: bool = option(
        False, "Use deterministic kernels only, which is slower, in addition to the seed."
    )
    debug: str | list[DebugOption] = option(
        "",
        "Debugging aids, separated by blanks: underflow_overflow; tpu_metrics_debug, which the Trainer "
        "of this version refuses.",
    )
    skip_memory_metrics: bool = option(
        True, "Leave memory figures out of the metrics. False adds them (needs psutil)."
    )
