"""What ``parallelism_config`` asks for: how many processes share a model, and how many have copies of it.

Sizes are those of accelerate's ``ParallelismConfig``. Its two dimensions of data parallelism are carried
out: ``dp_shard_size`` processes hold the parts of one model (FSDP2), and ``dp_replicate_size`` such groups
hold the same (hybrid sharding); with copies alone that is data parallelism. The dimensions in which
processes share a sample, which need layers written for them, are refused.
"""

from typing import Any

from attrs import frozen

from trainer.arguments.enums import FSDPOption

_SHARED_SAMPLES = {
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
HYBRID = (FSDPOption.HYBRID_SHARD, FSDPOption.HYBRID_SHARD_ZERO2)
"""Kinds of ``fsdp`` in which groups of processes hold the same."""


@frozen
class Parallelism:
    """How processes are arranged.

    Attributes:
        replicate: groups of processes that hold the same.
        shard: processes of a group, each of which holds a part.
    """

    replicate: int
    shard: int


def parallelism_of(args: Any) -> Parallelism | None:
    """Return what ``parallelism_config`` asks for; None if it is not given, or all sizes are 1.

    Raises:
        NotImplementedError: for tensor, context or sequence parallelism.
        ValueError: if the sizes are not those of the launch, or contradict ``fsdp``.
    """
    world = args.world_size  # first, as what a launcher says of the sizes is read with it
    config = getattr(args, "parallelism_config", None)
    if config is None:
        return None
    refused = [f"{key}={_size(config, key)}" for key in _SHARED_SAMPLES if _size(config, key) > 1]
    if refused:
        kinds = ", ".join(_SHARED_SAMPLES[text.partition("=")[0]] for text in refused)
        raise NotImplementedError(
            f"parallelism_config: {', '.join(refused)} is not available in this version ({kinds}): every "
            "process works on samples of its own. Set dp_shard_size and dp_replicate_size instead."
        )
    found = Parallelism(_size(config, "dp_replicate_size"), _size(config, "dp_shard_size"))
    if found == Parallelism(1, 1):
        return None
    _check(found, world, list(getattr(args, "fsdp", None) or ()))
    return found


def _check(found: Parallelism, world: int, options: list[FSDPOption]) -> None:
    sizes = f"dp_replicate_size={found.replicate} times dp_shard_size={found.shard}"
    words = " ".join(map(str, options))
    if found.replicate * found.shard != world:
        raise ValueError(
            f"parallelism_config: {sizes} is not the number of processes, {world}. Launch "
            f"{found.replicate * found.shard} processes (torchrun --nproc_per_node=N, accelerate launch), "
            "or change the sizes."
        )
    if found.shard == 1 and options and FSDPOption.NO_SHARD not in options:
        raise ValueError(
            f"parallelism_config: {sizes} distributes nothing, but fsdp={words} does. "
            "Leave fsdp out, or set dp_shard_size."
        )
    if found.shard > 1 and FSDPOption.NO_SHARD in options:
        raise ValueError(
            f"parallelism_config: {sizes} distributes the model, but fsdp=no_shard does not. Leave one out."
        )
    if found.replicate == 1 and any(option in HYBRID for option in options):
        raise ValueError(
            f"parallelism_config: {sizes} has no copies, which fsdp={words} asks for. "
            "Set dp_replicate_size, or fsdp=full_shard."
        )


def _size(config: Any, key: str) -> int:
    given = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    return int(given or 1)
