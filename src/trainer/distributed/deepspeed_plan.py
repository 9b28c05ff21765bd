"""What DeepSpeed is asked for, and what it cannot do, which is said at construction."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from attrs import define

from trainer.arguments import deepspeed as configuration
from trainer.distributed.fsdp_plan import NOT_ELEMENTWISE, sharding_of

_INSTALL = (
    "deepspeed needs the library DeepSpeed: pip install setuptools ninja, then DS_BUILD_OPS=0 pip install "
    "--no-build-isolation 'trainstep[deepspeed]'"
)


@define(eq=False)
class Zero:
    """DeepSpeed's part in a trainer.

    Attributes:
        config: the configuration, without what depends on the model and the length of a run.
        engine: DeepSpeed's engine once there is one; it owns the optimizer and its state.
        trains: whether the engine has an optimizer, rather than being for evaluation only.
        given: the optimizer that the engine was given, and the parameters that its groups had.
    """

    config: dict[str, Any]
    engine: Any = None
    trains: bool = False
    given: tuple[Any, list[list[Any]]] | None = None

    @property
    def stage(self) -> int:
        """1: optimizer state is distributed; 2: gradients as well; 3: parameters as well."""
        return configuration.stage_of(self.config)

    @property
    def partitions(self) -> bool:
        """Whether processes hold parts of the parameters, so that each forward pass needs all of them."""
        return self.stage == 3

    @property
    def gathers(self) -> bool:
        """Whether ``save_model`` may gather the weights on process 0."""
        key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        return not self.partitions or bool(configuration.value_at(self.config, key, False))

    @property
    def own_optimizer(self) -> bool:
        """Whether the configuration names the optimizer, so that DeepSpeed makes it."""
        return "optimizer" in self.config

    @property
    def own_scheduler(self) -> bool:
        """Whether the configuration names the schedule, so that DeepSpeed moves it."""
        return "scheduler" in self.config

    @property
    def half(self) -> str | None:
        """Name of the type in which parameters are kept and computed with; None for float32."""
        kinds = {"bf16": "bfloat16", "fp16": "float16"}
        on = (k for k in kinds if configuration.value_at(self.config, f"{k}.enabled", False))
        return next((kinds[kind] for kind in on), None)


def plan(args: Any, optimizers: Any, cls_and_kwargs: Any) -> Zero | None:
    """Return what the arguments, or else accelerate's configuration, ask for; None if neither does.

    Raises:
        ValueError: for values of the configuration or arguments that contradict each other, and for
            arguments that DeepSpeed cannot honour.
        ImportError: if DeepSpeed is not installed.
    """
    if not configuration.asked(args):
        return None
    config = configuration.raw_config(args)
    if sharding_of(args) is not None:
        raise ValueError(
            "fsdp and deepspeed both distribute the model; leave one of them out: fsdp is asked for by "
            "its argument, by dp_shard_size in parallelism_config or by accelerate's configuration, "
            "deepspeed by its argument or by accelerate's configuration."
        )
    zero = Zero(configuration.filled(args, config, args.world_size))
    problems = list(_conflicts(args, zero, optimizers, cls_and_kwargs))
    if problems:
        raise ValueError("deepspeed: " + "; ".join(problems))
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(_INSTALL)
    if args.n_gpu > 1:  # one process, which drives one GPU
        args._n_gpu = 1
    return zero


def library(args: Any) -> Any:
    """Import DeepSpeed for the device of ``args``.

    Raises:
        ImportError: if that fails, with how to install it.
    """
    if args.device.type == "cpu":  # else it looks for GPUs, and may find some
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return deepspeed


def _conflicts(args: Any, zero: Zero, optimizers: Any, cls_and_kwargs: Any) -> Iterator[str]:
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size would need another engine for every size; set "
            "per_device_train_batch_size"
        )
    if args.exact_reduction:
        yield "exact_reduction adds up whole gradients in a fixed tree, DeepSpeed in its own order"
    if args.on_nonfinite != "ignore":
        yield (
            f"on_nonfinite={args.on_nonfinite!r} judges gradients before the update, which DeepSpeed "
            "makes; with fp16 it skips those that overflow"
        )
    if args.async_save:
        yield "async_save: DeepSpeed saves its state itself, from all processes"
    if args.checkpoint_format == "hf":
        yield 'checkpoint_format="hf" holds no distributed state; use "safe"'
    if args.log_digest_steps:
        yield "log_digest_steps needs the whole state on one process; set it to 0"
    if args.save_on_each_node:
        yield "save_on_each_node would leave a part of the state on each node; set it to False"
    if args.torch_compile:
        yield "torch_compile does not reach into DeepSpeed's engine; leave it out"
    if args.bf16_full_eval or args.fp16_full_eval:
        yield "bf16_full_eval and fp16_full_eval replace weights that DeepSpeed holds; use bf16 or fp16"
    if args.save_only_model and args.load_best_model_at_end:
        yield "save_only_model does not go with load_best_model_at_end under DeepSpeed; leave one out"
    if args.save_only_model and not zero.gathers:
        yield (
            "save_only_model with stage 3 needs stage3_gather_16bit_weights_on_model_save: true in "
            "zero_optimization, or there would be no weights to save"
        )
    yield from _against_optimizers(args, zero, optimizers, cls_and_kwargs)


def _against_optimizers(
    args: Any, zero: Zero, optimizers: Any, cls_and_kwargs: Any
) -> Iterator[str]:
    optimizer, scheduler = optimizers
    if zero.own_optimizer and (optimizer is not None or cls_and_kwargs is not None):
        yield "the configuration has an optimizer, and Trainer was given one; leave one of them out"
    if zero.own_scheduler and scheduler is not None:
        yield "the configuration has a scheduler, and Trainer was given one; leave one of them out"
    if zero.own_optimizer and scheduler is not None:
        yield (
            "Trainer was given a scheduler, which belongs to an optimizer that the configuration's is "
            "not; override create_scheduler"
        )
    if zero.own_optimizer or optimizer is not None or cls_and_kwargs is not None:
        return
    name = str(args.optim)
    if any(word in name for word in NOT_ELEMENTWISE):
        yield (
            f"optim={name} needs whole rows or matrices, which DeepSpeed lays flat; choose one that "
            "updates each number by itself, such as adamw_torch_fused"
        )
    if name.startswith("schedule_free"):
        yield f"optim={name} evaluates with other weights than it trains, which the engine does not know"
