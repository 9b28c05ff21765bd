"""Normalise and check the arguments of fully sharded training."""

import logging
import warnings
from collections.abc import Iterable
from typing import Any

from .convert import as_mapping
from .enums import FSDPOption, plain

logger = logging.getLogger(__name__)

_DEFAULTS = {
    "min_num_params": 0,
    "xla": False,
    "xla_fsdp_v2": False,
    "xla_fsdp_grad_ckpt": False,
}


def fsdp_options(value: bool | str | Iterable[FSDPOption | str] | None) -> list[FSDPOption]:
    """Turn ``fsdp`` into a list of options; ``True`` means ``full_shard``, nothing means none.

    Raises:
        ValueError: An option is unknown, ``offload`` stands alone, or two options exclude each other.
    """
    if value is True:
        value = "full_shard"
    if not value:
        return []
    words = [value] if isinstance(value, str) else list(value)
    options = [FSDPOption(part) for word in words for part in str(plain(word)).split()]
    if options == [FSDPOption.OFFLOAD]:
        raise ValueError(
            "fsdp: 'offload' does not work alone; add a sharding option, as in 'full_shard offload'."
        )
    if FSDPOption.FULL_SHARD in options and FSDPOption.SHARD_GRAD_OP in options:
        raise ValueError("fsdp: 'full_shard' and 'shard_grad_op' exclude each other; give one.")
    return options


def fsdp_details(value: Any) -> dict[str, Any]:
    """Turn ``fsdp_config`` into a new dict, with a leading ``fsdp_`` of its keys removed.

    Raises:
        ValueError: The value is no dict, JSON text or JSON file.
    """
    given = as_mapping("fsdp_config", value) or {}
    config = {key.removeprefix("fsdp_"): item for key, item in given.items()}
    for key, default in _DEFAULTS.items():
        config.setdefault(key, default)
    layers = config.get("transformer_layer_cls_to_wrap")
    if isinstance(layers, str):
        config["transformer_layer_cls_to_wrap"] = [layers]
    return config


def check_fsdp(
    options: list[FSDPOption], config: dict[str, Any], gradient_checkpointing: bool
) -> None:
    """Check that options and details fit together.

    Warns:
        UserWarning: Details were given that have no effect without ``fsdp``.

    Raises:
        ValueError: Two details exclude each other.
    """
    by_size = config["min_num_params"] > 0
    by_layer = config.get("transformer_layer_cls_to_wrap") is not None
    for present, key in ((by_size, "min_num_params"), (by_layer, "transformer_layer_cls_to_wrap")):
        if present and not options:
            warnings.warn(f"fsdp_config: {key} has no effect without fsdp.", stacklevel=6)
    if options and by_size and by_layer:
        raise ValueError(
            "fsdp_config: min_num_params and transformer_layer_cls_to_wrap exclude each other; "
            "wrap by size or by layer class."
        )
    efficient = _flag(config.get("cpu_ram_efficient_loading", False))
    if options and efficient and not _flag(config.get("sync_module_states", True)):
        raise ValueError(
            "fsdp_config: cpu_ram_efficient_loading loads weights on one process only, so it needs "
            "sync_module_states; set it to true."
        )
    if gradient_checkpointing and {FSDPOption.FULL_SHARD, FSDPOption.HYBRID_SHARD} & set(options):
        logger.warning(
            "With fully sharded parameters gradient_checkpointing gathers them a second time in the "
            "backward pass; set activation_checkpointing in fsdp_config instead."
        )


def _flag(value: Any) -> bool:
    return value.lower() == "true" if isinstance(value, str) else bool(value)
