"""What ``accelerate launch`` says about FSDP in the environment, in the words of ``fsdp_config``."""

from collections.abc import Mapping
from typing import Any

from trainer.arguments.enums import FSDPOption

_KEYS = {
    "FSDP_VERSION": "version",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_layer_cls_to_wrap",
    "FSDP_MIN_NUM_PARAMS": "min_num_params",
    "FSDP_OFFLOAD_PARAMS": "offload_params",
    "FSDP_BACKWARD_PREFETCH": "backward_prefetch",
    "FSDP_FORWARD_PREFETCH": "forward_prefetch",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_USE_ORIG_PARAMS": "use_orig_params",
    "FSDP_SYNC_MODULE_STATES": "sync_module_states",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "cpu_ram_efficient_loading",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activation_checkpointing_offload",
    "FSDP_IGNORED_MODULES": "ignored_modules",
}

# The numbers that accelerate gives the strategies of its first version.
_STRATEGIES = {str(number): option for number, option in enumerate(list(FSDPOption)[:5], 1)}


def from_environment(
    environment: Mapping[str, str],
) -> tuple[list[FSDPOption], dict[str, Any]] | None:
    """Return ``(options, config)`` of accelerate's configuration; None if it does not ask for FSDP.

    Variables are those that ``accelerate launch --use_fsdp`` sets, of its version 1 or 2.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    config: dict[str, Any] = {
        key: environment[name] for name, key in _KEYS.items() if environment.get(name)
    }
    if config.get("activation_checkpointing_offload", "").lower() == "false":
        del config["activation_checkpointing_offload"]
    options = [_strategy(environment)]
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy != "NO_WRAP":
        options.append(FSDPOption.AUTO_WRAP)
    layers = config.pop("transformer_layer_cls_to_wrap", None)
    if layers and policy == "TRANSFORMER_BASED_WRAP":
        config["transformer_layer_cls_to_wrap"] = [name.strip() for name in layers.split(",")]
    if policy != "SIZE_BASED_WRAP":
        config.pop("min_num_params", None)
    return options, config


def _strategy(environment: Mapping[str, str]) -> FSDPOption:
    given = environment.get("FSDP_SHARDING_STRATEGY") or environment.get(
        "FSDP_RESHARD_AFTER_FORWARD", ""
    )
    if given in _STRATEGIES:
        return _STRATEGIES[given]
    names = {option.name: option for option in FSDPOption}
    return names.get(given.upper(), FSDPOption.FULL_SHARD)
