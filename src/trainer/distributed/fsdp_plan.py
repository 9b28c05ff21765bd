"""What ``fsdp`` and ``fsdp_config`` ask for, as a plan for ``fully_shard``; the rest is refused."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attrs import frozen

from trainer.arguments.enums import FSDPOption
from trainer.distributed.fsdp_environment import from_environment
from trainer.distributed.parallelism import HYBRID, parallelism_of

StateDict = Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"]

_STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
_SHARDING = (FSDPOption.FULL_SHARD, FSDPOption.SHARD_GRAD_OP, FSDPOption.NO_SHARD, *HYBRID)

# Keys whose values are read here or, for the first three, have no effect on what fully_shard does.
_KNOWN = frozenset(
    {"limit_all_gathers", "use_orig_params", "sync_module_states"}
    | {"min_num_params", "transformer_layer_cls_to_wrap", "backward_prefetch", "forward_prefetch"}
    | {"cpu_ram_efficient_loading", "activation_checkpointing", "version", "reshard_after_forward"}
    | {"state_dict_type", "offload_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"}
    | {"xla_fsdp_settings"}
)

_XLA = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt")

NOT_ELEMENTWISE = (
    "adafactor",
    "galore",
    "apollo",
    "lomo",
    "8bit",
    "4bit",
    "paged",
    "lamb",
    "muon",
)
"""Words in the names of updates that look at whole rows or matrices, of which a process has a part."""


@frozen
class Sharding:
    """How a model is distributed over the processes.

    Attributes:
        layers: names of the classes of layers that are gathered one at a time; None takes the model's.
        least: numbers in the parameters of a part that is gathered by itself; 0 wraps by layers.
        wraps: whether there are such parts; otherwise the model is gathered as a whole.
        reshard: free gathered parameters after the forward pass, and gather them again backward.
        kind: the first word of ``fsdp``: over how many processes parameters are distributed.
        together: the number of them, if ``parallelism_config`` says; 0 leaves it to ``kind``.
        offload: keep parameters, gradients and moments on the host between uses.
        checkpointing: compute the activations of wrapped parts again in the backward pass.
        prefetch: gather the next part while one computes, in the order of the modules.
        state_dict: whether checkpoints hold the whole state, or each process's part of it.
    """

    layers: tuple[str, ...] | None = None
    least: int = 0
    wraps: bool = False
    reshard: bool = True
    kind: FSDPOption = FSDPOption.FULL_SHARD
    together: int = 0
    offload: bool = False
    checkpointing: bool = False
    prefetch: bool = False
    state_dict: StateDict = "SHARDED_STATE_DICT"


def wanted(args: Any) -> bool:
    """Tell whether parameters are to be distributed over several processes."""
    return args.world_size > 1 and sharding_of(args) is not None


def sharding_of(args: Any) -> Sharding | None:
    """Return what the arguments ask for, or else accelerate's configuration; None if neither does.

    Raises:
        ValueError: naming the key of ``fsdp_config`` that cannot be honoured, and why.
    """
    options, config = list(args.fsdp or ()), dict(args.fsdp_config or {})
    parallel = parallelism_of(args)
    together = parallel.shard if parallel is not None else 0
    if not options:
        found = from_environment(os.environ)
        if found is not None:
            options, config = found
        elif together < 2:
            return None
    problems = list(_problems(config))
    if problems:
        raise ValueError("fsdp_config: " + "; ".join(problems))
    kind = next((option for option in _SHARDING if option in options), FSDPOption.FULL_SHARD)
    layers = config.get("transformer_layer_cls_to_wrap")
    least = int(config.get("min_num_params") or 0)
    return Sharding(
        layers=tuple([layers] if isinstance(layers, str) else layers) if layers else None,
        least=least,
        wraps=FSDPOption.AUTO_WRAP in options or bool(layers) or least > 0,
        reshard=_reshard(kind, config),
        kind=kind,
        together=together,
        offload=FSDPOption.OFFLOAD in options or flag(config, "offload_params"),
        checkpointing=flag(config, "activation_checkpointing"),
        prefetch=flag(config, "forward_prefetch"),
        state_dict=str(config.get("state_dict_type") or _STATE_DICTS[1]).upper(),  # type: ignore[arg-type]
    )


def in_parts(args: Any) -> bool:
    """Tell whether checkpoints hold each process's parts, rather than the whole state."""
    plan = sharding_of(args)
    return plan is not None and plan.state_dict == "SHARDED_STATE_DICT"


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Return a switch that may be written as a text."""
    value = config.get(key, default)
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def check(args: Any, optimizers: Any) -> None:
    """Say at construction what sharded training cannot do.

    Raises:
        RuntimeError: if an optimizer or a scheduler is given: they hold parameters that sharding replaces.
        ValueError: for arguments that contradict each other or cannot be honoured.
    """
    plan = sharding_of(args)
    if plan is None:
        return
    if args.deepspeed:
        raise ValueError(
            "fsdp and deepspeed both distribute the model; leave one of the two arguments out."
        )
    if args.world_size == 1:
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "fsdp distributes the model over several processes, but this is the only one. Launch with "
                "torchrun --nproc_per_node=N or accelerate launch, or leave fsdp out."
            )
        return  # launched with one: nothing to distribute
    if any(part is not None for part in optimizers):
        raise RuntimeError(
            "fsdp replaces the model's parameters by parts of them when training starts, which an "
            "optimizer that was built before does not have. Leave optimizers out: choose optim in the "
            "arguments, or override create_optimizer."
        )
    problems = list(_conflicts(args, plan))
    if problems:
        raise ValueError("fsdp: " + "; ".join(problems))


def _conflicts(args: Any, plan: Sharding) -> Iterator[str]:
    if plan.checkpointing and args.gradient_checkpointing:
        yield (
            "activation_checkpointing in fsdp_config and gradient_checkpointing do the same; set only "
            "the former"
        )
    if args.exact_reduction:
        yield (
            "exact_reduction adds up whole gradients in a fixed tree, but reduce-scatter adds parts of "
            "them in its own order; leave one of the two out"
        )
    if args.save_only_model and plan.state_dict == "SHARDED_STATE_DICT":
        yield (
            "save_only_model writes a model file, and state_dict_type=SHARDED_STATE_DICT writes none; set "
            "state_dict_type to FULL_STATE_DICT"
        )
    if args.save_only_model and args.load_best_model_at_end:
        yield "save_only_model does not go with load_best_model_at_end under FSDP; leave one out"
    if args.checkpoint_format == "hf":
        yield 'checkpoint_format="hf" holds no distributed state; use "safe"'
    if args.save_on_each_node:
        yield "save_on_each_node would leave a part of the state on each node; set it to False"
    if args.bf16_full_eval or args.fp16_full_eval:
        yield (
            "bf16_full_eval and fp16_full_eval replace whole weights, of which each process has a part; "
            "use bf16 or fp16, which evaluate in half precision as well"
        )
    if args.log_digest_steps:
        yield "log_digest_steps needs the whole state on one process, again and again; set it to 0"
    name = str(args.optim)
    if name.startswith("schedule_free") and plan.state_dict == "SHARDED_STATE_DICT":
        yield (
            f"optim={name} evaluates with other weights than it trains, which a checkpoint in parts does "
            "not hold; set state_dict_type to FULL_STATE_DICT"
        )
    if any(word in name for word in NOT_ELEMENTWISE):
        yield (
            f"optim={name} needs whole rows or matrices, of which each process has a part; choose one that "
            "updates each number by itself, such as adamw_torch_fused"
        )


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    unknown = sorted(set(config) - _KNOWN)
    if unknown:
        yield f"unknown {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}"
    if str(config.get("version", 2)) not in ("1", "2"):
        yield f"version must be 1 or 2, got {config['version']!r}"
    if asked := [key for key in _XLA if config.get(key) and flag(config, key)]:
        yield _without_xla(asked[0])
    elif config.get("xla_fsdp_settings"):
        yield "xla_fsdp_settings has no effect without xla; leave it out"
    if not flag(config, "use_orig_params", True):
        yield "use_orig_params=False flattens parameters, which fully_shard never does; leave it out"
    if not flag(config, "limit_all_gathers", True):
        yield "limit_all_gathers=False is not possible, fully_shard always limits them; leave it out"
    prefetch = str(config.get("backward_prefetch") or "").upper()
    if prefetch not in ("", "NONE", "NO_PREFETCH", "BACKWARD_PRE"):
        yield (
            f"backward_prefetch={config['backward_prefetch']} is not possible: fully_shard gathers the "
            "next part before a gradient is computed; use backward_pre"
        )
    kind = str(config.get("state_dict_type") or _STATE_DICTS[1]).upper()
    if kind not in _STATE_DICTS:
        yield f"state_dict_type must be one of {', '.join(_STATE_DICTS)}, got {kind}"


def _without_xla(key: str) -> str:
    there = "" if importlib.util.find_spec("torch_xla") else ", which is not installed,"
    return (
        f"{key} asks for the FSDP of torch_xla{there} and training on TPUs is not available in this "
        "version; leave it out, and fsdp is PyTorch's own"
    )


def _reshard(kind: FSDPOption, config: Mapping[str, Any]) -> bool:
    default = kind in (FSDPOption.FULL_SHARD, FSDPOption.HYBRID_SHARD)
    value = config.get("reshard_after_forward")
    if value is None or str(value).upper() in {option.name for option in _SHARDING}:
        return default  # accelerate writes the name of the sharding here
    return flag(config, "reshard_after_forward")
