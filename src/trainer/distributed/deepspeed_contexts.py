"""When there is an engine of DeepSpeed: blocks of code that it takes part in, and its end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from trainer.arguments import deepspeed as configuration
from trainer.distributed.deepspeed_plan import Zero, library
from trainer.distributed.ranks import leave_at_exit


@contextmanager
def as_launched(trainer: Any) -> Iterator[None]:
    """Give a process that no launcher started a group of its own, and what DeepSpeed looks for."""
    if not dist.is_initialized():
        backend = "nccl" if trainer.args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        leave_at_exit()
    wanted = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:  # else whatever is made later would take this process for a launched one
        for name in missing:
            del os.environ[name]


@contextmanager
def updating(trainer: Any) -> Iterator[None]:
    """The block in which the engine trains; one that an exception leaves there is dropped.

    It may have gradients of some micro-batches, to which the next training would add its own.
    """
    with as_launched(trainer):
        try:
            yield
        except BaseException:
            drop(trainer._zero)
            trainer.model_wrapped = trainer.model
            raise


@contextmanager
def evaluating(trainer: Any) -> Iterator[None]:
    """A block in which all processes evaluate a model of which they hold parts.

    Before any training an engine without optimizer is built for it.
    """
    zero: Zero = trainer._zero
    with as_launched(trainer):
        if zero.engine is None:
            config = configuration.finished(trainer.args, zero.config, trainer.model, 1)
            config = {k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}
            made = library(trainer.args).initialize(model=trainer.model, config=config)
            zero.engine, zero.trains = made[0], False
        yield


def drop(zero: Zero) -> None:
    """Take an engine off its model, which keeps the weights as they are.

    The optimizer that the engine was given has the model's parameters again, and no moments.
    """
    if zero.engine is not None:
        zero.engine.destroy()
    if zero.given is not None:
        optimizer, parameters = zero.given
        optimizer.state.clear()
        for group, own in zip(optimizer.param_groups, parameters, strict=True):
            group["params"] = own
    zero.engine, zero.trains, zero.given = None, False, None


@contextmanager
def models_in_parts(trainer: Any) -> Iterator[None]:
    """Let models that are made in the block be in parts from the beginning, with stage 3."""
    zero: Zero | None = trainer._zero
    if zero is None or not zero.partitions or trainer.args.hf_deepspeed_config is not None:
        yield  # transformers makes its models so by itself
        return
    config = {**zero.config, "zero_optimization": _without_autos(zero.config["zero_optimization"])}
    # Their type is that of the configuration: DeepSpeed 0.19.8 ignores one that is given where the device
    # has bfloat16 and no float16.
    with as_launched(trainer), library(trainer.args).zero.Init(config_dict_or_path=config):
        yield


def dtype_of(zero: Zero) -> torch.dtype:
    """Return the type of the engine's parameters."""
    dtype: torch.dtype = getattr(torch, zero.half or "float32")
    return dtype


def _without_autos(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value != configuration.AUTO}
