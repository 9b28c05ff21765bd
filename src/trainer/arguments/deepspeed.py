"""The DeepSpeed configuration: where it comes from, and how the arguments fill it in.

Values of ``"auto"`` are taken from the arguments. So are those that a run cannot do without and that are
left out (batch sizes, accumulation, clipping, precision, learning rate): DeepSpeed would put numbers of
its own in their place, and the arguments would have no effect. A value that is given must agree with them.
"""

import copy
import importlib.util
import os
from typing import Any

from .convert import as_mapping
from .deepspeed_filling import AUTO as AUTO
from .deepspeed_filling import Filling, autos, fill_buckets, fill_optimizer
from .deepspeed_filling import stage_of as stage_of
from .deepspeed_filling import value_at as value_at

# What DeepSpeed's schedules read; each needs the numbers of warm-up steps, some that of all.
_WARMING = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_DECAYING = ("WarmupDecayLR", "WarmupCosineLR")
_PRECISIONS = ("bf16", "fp16")


def asked(args: Any) -> bool:
    """Tell whether DeepSpeed is to train: by ``deepspeed``, or by accelerate's configuration."""
    return bool(args.deepspeed) or _by_accelerate()


def raw_config(args: Any) -> dict[str, Any]:
    """Return a copy of the configuration as it was given; see ``asked``.

    Raises:
        ValueError: if it is no dict, JSON text or readable JSON file, or has no ZeRO stage.
    """
    if args.deepspeed:
        config = copy.deepcopy(dict(as_mapping("deepspeed", args.deepspeed) or {}))
    else:
        config = _from_accelerate()
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ValueError(
            f"deepspeed: zero_optimization.stage must be 1, 2 or 3, got {stage!r}. Stage 0 distributes "
            "nothing: leave deepspeed out for it."
        )
    if "bfloat16" in config:  # DeepSpeed's former name
        config.setdefault("bf16", config.pop("bfloat16"))
    return config


def offloads(config: dict[str, Any]) -> bool:
    """Tell whether optimizer or parameters are kept on the host or on NVMe."""
    places = (f"zero_optimization.offload_{what}.device" for what in ("optimizer", "param"))
    return any(value_at(config, place, "none") not in (None, "none") for place in places)


def filled(args: Any, config: dict[str, Any], processes: int | None) -> dict[str, Any]:
    """Return a configuration with all values that need neither the model nor the length of the run.

    Args:
        args: the training arguments.
        config: as ``raw_config`` returns it; not changed.
        processes: how many there are; None leaves out what depends on it.

    Raises:
        ValueError: listing the values that disagree with the arguments.
    """
    filling = Filling(copy.deepcopy(config))
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    put = filling.put
    put("train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size", add=True)
    put("gradient_accumulation_steps", accumulation, "gradient_accumulation_steps", add=True)
    if processes is None:
        filling.config.pop("train_batch_size", None)
    else:
        name = f"per_device_train_batch_size * gradient_accumulation_steps * {processes} processes"
        put("train_batch_size", micro * accumulation * processes, name, add=True)
    put("gradient_clipping", float(args.max_grad_norm or 0.0), "max_grad_norm", add=True)
    for kind in _PRECISIONS:
        wanted = args.mixed_precision == kind
        if kind in filling.config:
            put(f"{kind}.enabled", wanted, kind, add=True)
        elif wanted:
            filling.config[kind] = {"enabled": True}
    fill_optimizer(args, filling)
    put("scheduler.params.warmup_min_lr", 0, "", check=False)
    warms = value_at(filling.config, "scheduler.type") in _WARMING[:2]
    put("scheduler.params.warmup_max_lr", args.learning_rate, "learning_rate", add=warms)
    filling.config.setdefault("steps_per_print", 2**62)  # the trainer logs
    if "optimizer" not in filling.config:
        filling.config.setdefault("zero_allow_untested_optimizer", True)
        if offloads(filling.config):
            filling.config.setdefault("zero_force_ds_cpu_optimizer", False)
    filling.raise_if_wrong()
    return filling.config


def finished(args: Any, config: dict[str, Any], model: Any, updates: int) -> dict[str, Any]:
    """Return a configuration from ``filled`` with what depends on the model and the length of the run.

    Args:
        args: the training arguments.
        config: not changed.
        model: whose ``config.hidden_size`` decides the sizes of buckets that are ``"auto"``.
        updates: of the run.

    Raises:
        ValueError: listing values that disagree with the arguments, or that nothing fills in.
    """
    filling = Filling(copy.deepcopy(config))
    kind = value_at(config, "scheduler.type")
    warmup = args.get_warmup_steps(updates)
    put = filling.put
    put("scheduler.params.warmup_num_steps", warmup, "warmup_steps", add=kind in _WARMING)
    put("scheduler.params.total_num_steps", updates, "updates of the run", add=kind in _DECAYING)
    fill_buckets(filling, model)
    filling.raise_if_wrong()
    zero = filling.config["zero_optimization"]
    for name in [name for name, value in zero.items() if value == AUTO]:
        del zero[name]  # of another stage, or DeepSpeed's to choose
    left = list(autos(filling.config))
    if left:
        raise ValueError(
            f'deepspeed: nothing says what "auto" is for {", ".join(left)}; give values in the '
            "configuration, or leave the keys out."
        )
    return filling.config


def _by_accelerate() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def _from_accelerate() -> dict[str, Any]:
    """Return what ``accelerate launch`` put into the environment, as accelerate's plugin reads it."""
    from accelerate.utils import DeepSpeedPlugin

    return copy.deepcopy(DeepSpeedPlugin().deepspeed_config)


def announce(args: Any) -> Any:
    """Let ``from_pretrained`` know of ZeRO-3, so that it makes models in parts.

    That takes the arguments to be made before the model. Transformers forgets what it was told when the
    object that is returned is gone.

    Returns:
        transformers' ``HfDeepSpeedConfig``; None if there is nothing to tell or nobody to listen.
    """
    if not asked(args):
        return None
    if not all(importlib.util.find_spec(name) for name in ("deepspeed", "transformers")):
        return None
    try:
        config = raw_config(args)
    except ValueError:
        return None  # a trainer says so
    if stage_of(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(filled(args, config, processes=None))
