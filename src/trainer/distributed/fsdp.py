"""Fully sharded data parallelism: every process holds a part of each parameter, gradient and moment.

``shard`` distributes a model in place with PyTorch's ``fully_shard``; its parameters, and the train state
made of them, are ``DTensor`` from then on. Before a part of the model computes it is gathered, and its
gradients are averaged over the processes and distributed again while the backward pass goes on.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from trainer import modeling
from trainer.arguments.enums import FSDPOption
from trainer.distributed.fsdp_plan import Sharding, sharding_of
from trainer.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Lists of layers compute nothing themselves; attention reads the weights of its own part directly.
_NEVER_ALONE = (nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)


def is_sharded(model: Any) -> bool:
    """Tell whether a model's parameters are distributed."""
    return isinstance(modeling.unwrap(model), FSDPModule)


def shard(trainer: Any) -> None:
    """Distribute the trainer's model, if that is asked for and not done yet, with the weights of process 0.

    Optimizer and train state that were made before hold the whole parameters, and are forgotten.

    Raises:
        ValueError: if no layer of the model has a name that is to be wrapped.
    """
    plan = sharding_of(trainer.args)
    model = modeling.unwrap(trainer.model)
    if plan is None or trainer.args.world_size == 1:
        return
    if isinstance(model, FSDPModule):
        settle(model)
        return
    parts = _parts(model, plan)
    ranks: Ranks = trainer._ranks
    options: dict[str, Any] = {
        "mesh": _mesh(plan, ranks),
        "mp_policy": _precision(trainer.args.mixed_precision),
        "reshard_after_forward": plan.reshard,
    }
    if plan.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    made: dict[int, Any] = {}
    for part in [*parts, model]:
        _receive(part, ranks, made)
        if plan.checkpointing and part is not model:
            _checkpoint(part)
        fully_shard(part, **options)
    if plan.prefetch:
        for following, part in pairwise(parts):
            part.set_modules_to_forward_prefetch([following])
    if trainer.args.ddp_find_unused_parameters:
        _take_unused(model)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    trainer.optimizer = trainer._adopted = trainer._train_state = None
    logger.info(
        "The model is distributed over %d processes (%s), gathered in %d parts.",
        ranks.size,
        plan.kind.value,
        len(parts) + 1,
    )


def settle(model: Any) -> None:
    """Free what a forward pass without a backward pass has left gathered; parameters are parts again."""
    for module in modeling.unwrap(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def settled(model: Any) -> Iterator[None]:
    """``settle`` a model at the end of the block."""
    try:
        yield
    finally:
        settle(model)


def _parts(model: nn.Module, plan: Sharding) -> list[Any]:
    """Return the modules that are gathered by themselves, the last in the model first."""
    if not plan.wraps:
        return []
    if plan.least:
        return _by_size(model, plan.least)
    names = plan.layers or tuple(getattr(model, "_no_split_modules", None) or ())
    if not names:
        raise ValueError(
            f"fsdp auto_wrap: {type(model).__name__} does not say which of its layers to wrap "
            "(_no_split_modules). Name their classes in fsdp_config as transformer_layer_cls_to_wrap, or "
            "set min_num_params."
        )
    inner = [module for module in model.modules() if module is not model]
    found = [module for module in inner if type(module).__name__ in names]
    if not found:
        kinds = sorted({type(module).__name__ for module in inner})
        raise ValueError(
            f"fsdp_config: transformer_layer_cls_to_wrap names {', '.join(sorted(names))}, but "
            f"{type(model).__name__} has no such layer; it has {', '.join(kinds)}."
        )
    return found[::-1]


def _by_size(model: nn.Module, least: int) -> list[Any]:
    """Return modules with so many numbers in parameters that are not in a part within them."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(module: nn.Module) -> int:
        rest = sum([visit(child) for child in module.children()])
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                rest += parameter.numel()
        if rest < least or module is model or isinstance(module, _NEVER_ALONE):
            return rest
        found.append(module)
        return 0

    visit(model)
    return found[::-1]


def _mesh(plan: Sharding, ranks: Ranks) -> DeviceMesh:
    """Return which processes share the parameters, and which have the same."""
    device = ranks.device.type
    if plan.together == ranks.size:
        return init_device_mesh(device, (ranks.size,), mesh_dim_names=("shard",))
    if plan.together:
        together = plan.together
    elif plan.kind is FSDPOption.NO_SHARD:
        together = 1
    elif plan.kind in (FSDPOption.HYBRID_SHARD, FSDPOption.HYBRID_SHARD_ZERO2):
        together = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    else:
        return init_device_mesh(device, (ranks.size,), mesh_dim_names=("shard",))
    if ranks.size % together:
        raise ValueError(
            f"fsdp={plan.kind.value}: {ranks.size} processes are not a multiple of the {together} on this "
            "machine; start as many on each."
        )
    shape = (ranks.size // together, together)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _precision(mixed: str) -> MixedPrecisionPolicy:
    """Return in which types parts are gathered and gradients averaged.

    Gathered in the half type, which is what they compute in; averaged in float32, which autocast gives
    data parallelism as well.
    """
    half = _HALF.get(mixed)
    if half is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def _receive(part: nn.Module, ranks: Ranks, made: dict[int, Any]) -> None:
    """Put a part of the model on the device, with the tensors of process 0.

    Those of other processes may be on the meta device, without memory until now; ``made`` notes what took
    their place, as several modules may share one.
    """
    for module in part.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or hasattr(tensor, "placements"):
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _materialised(tensor, ranks.device)
                    dist.broadcast(made[id(tensor)].data, src=0)
                tensors[name] = made[id(tensor)]


def _materialised(tensor: Any, device: torch.device) -> Any:
    if not tensor.is_meta:
        tensor.data = tensor.data.to(device)
        return tensor
    data = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _checkpoint(part: nn.Module) -> None:
    """Let a module compute its activations again in the backward pass, rather than keep them.

    ``forward`` is replaced on the object: names stay, and what gathers parameters stays around it.
    """
    forward = part.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not part.training or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    part.forward = again


def _take_unused(model: Any) -> None:
    """Let parameters that a process's loss does not reach count with a gradient of zero."""
    include = getattr(model, "set_reduce_scatter_unused_params", None)
    if include is None:
        raise ValueError(
            "ddp_find_unused_parameters=True with fsdp needs a PyTorch whose fully_shard averages "
            f"gradients that only some processes have (2.13); this is {torch.__version__}."
        )
    include(True)
