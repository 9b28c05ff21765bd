"""Steps without a Trainer: DDP and FSDP2 as one writes them by hand, and the pure step."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gpt
from gpu_sides import CLIP, DECAY, FOREVER, LR, MakeGate

Gate = Callable[[], None]


def batch_of(size: gpt.Size, device: str) -> dict[str, Tensor]:
    """Return this rank's batch, on its device."""
    made = gpt.batch(size, 1 + int(os.environ.get("RANK", "0")))
    return {name: tensor.to(device) for name, tensor in made.items()}


def run_loop(size: gpt.Size, device: str, make_gate: MakeGate) -> None:
    """Train with DDP, or without if there is no group."""
    model = gpt.build(size, device)
    wrapped: Any = model
    if dist.is_initialized():
        ids = [torch.cuda.current_device()] if device == "cuda" else None
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    _train(model, wrapped, batch_of(size, device), device, make_gate(), autocast=True)


def run_fsdp(size: gpt.Size, device: str, make_gate: MakeGate, autocast: bool = True) -> None:
    """Train with ``fully_shard``, parameters gathered in bfloat16 and gradients averaged in float32."""
    model = gpt.build(size, device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    _train(model, model, batch_of(size, device), device, make_gate(), autocast)


def _train(
    model: Any, forward: Any, batch: dict[str, Tensor], device: str, gate: Gate, autocast: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, fused=True)
    while True:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = forward(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        gate()


def pure_step(model: Any, device: str, **options: Any) -> Any:
    """Return the pure step of the benchmarks: bfloat16 autocast, AdamW, clipping."""
    import trainstep as ts

    def loss(call: Any, data: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return call(**data)["loss"]

    return ts.make_step(
        ts.module_loss(model, loss),
        ts.optim.adamw(weight_decay=DECAY),
        schedule=ts.schedules.linear(LR, FOREVER),
        transforms=(ts.transforms.clip_by_global_norm(CLIP),),
        **options,
    )


def run_pure(
    size: gpt.Size, device: str, make_gate: MakeGate, exact: bool = False, captured: bool = False
) -> None:
    """Train with ``data_parallel``, donated or captured with what ranks exchange."""
    import trainstep as ts

    model = gpt.build(size, device)
    plain = pure_step(model, device)
    state = plain.init(model, copy=False)
    if captured:
        step: Any = ts.capture(ts.data_parallel(plain, exact=exact))
    else:
        step = ts.data_parallel(ts.donate(plain), exact=exact)
    batch, gate = batch_of(size, device), make_gate()
    while True:
        state, _ = step(state, batch)
        gate()
