"""Fields on devices, processes and the engines that spread work over them."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass
from typing import Any

from ..enums import FSDPOption
from .option import option


@dataclass(repr=False)
class DistributedFields:
    """Where the work runs and how it is split."""

    average_tokens_across_devices: bool = option(
        True, "Divide the loss by the number of label tokens of all processes, not of each one."
    )
    use_cpu: bool = option(False, "Run on the CPU even if there is an accelerator.")
    accelerator_config: dict[str, Any] | str | None = option(
        None,
        "Options of accelerate's data loading, such as split_batches: a dict, JSON text or JSON file.",
    )
    parallelism_config: dict[str, Any] | Any | None = option(
        None,
        "Sizes of data parallelism (dp_shard_size, dp_replicate_size) for accelerate, or JSON text. "
        "Sizes of tensor, context and sequence parallelism above 1 are refused.",
    )
    ddp_find_unused_parameters: bool | None = option(
        None, "DDP: look for parameters without gradients. None decides by the model."
    )
    ddp_bucket_cap_mb: int | None = option(None, "DDP: size of a gradient bucket in MB.")
    ddp_broadcast_buffers: bool | None = option(
        None,
        "DDP: send buffers from the first process after each update. None does; False sends none.",
    )
    ddp_static_graph: bool | None = option(
        None, "DDP: assume that the graph is the same in every step."
    )
    ddp_backend: str | None = option(
        None,
        "Communication backend of the process group. None decides by the device.",
        choices=("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    )
    ddp_timeout: int = option(1800, "Seconds after which a collective operation fails.")
    fsdp: list[FSDPOption] | str | None = option(
        None,
        "Options of fully sharded training, separated by blanks: full_shard, shard_grad_op, "
        "no_shard, hybrid_shard, hybrid_shard_zero2, offload, auto_wrap.",
    )
    fsdp_config: dict[str, Any] | str | None = option(
        None, "Details of fully sharded training: a dict, JSON text or JSON file."
    )
    deepspeed: dict[str, Any] | str | None = option(
        None, "DeepSpeed configuration, which switches it on: a dict, JSON text or JSON file."
    )
    local_rank: int = option(
        -1, "Accepted for old launchers only; read the property local_process_index instead."
    )
