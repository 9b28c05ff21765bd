"""The bits of a training with ``exact_reduction``, on 1, 2, 4, ... ranks."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from attrs import evolve

import gpt
from gpu_sides import CLIP, DECAY, LR, Tokens
from multi import loops, ranks
from multi.contender import SIZES

STEPS = 5


def run(size: str, world: int, most: int, device: str, out: Path) -> None:
    """Train on ``world`` ranks, ``most`` micro-batches an update; rank 0 writes the digests.

    Deterministic kernels, dropout 0.1: by the Trainer, and by ``data_parallel(exact=True)``.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    ranks.place(device)
    found = {"trainer": _trainer(SIZES[size], world, most, device)}
    found["data_parallel"] = _pure(SIZES[size], world, most, device)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))
    ranks.leave()


def _shape(size: gpt.Size) -> gpt.Size:
    return evolve(size, batch=min(size.batch, 4))


def _trainer(size: gpt.Size, world: int, most: int, device: str) -> str:
    import trainstep as ts
    from trainer import Trainer, TrainingArguments

    size = _shape(size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=most // world,
            max_steps=STEPS,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=True,
            full_determinism=True,
            exact_reduction=True,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device == "cpu",
        )
        model = gpt.build(size, device, dropout=0.1)
        trainer = Trainer(model, arguments, train_dataset=Tokens(size))
        trainer.train()
        return ts.digest(trainer.train_state)


def _pure(size: gpt.Size, world: int, most: int, device: str) -> str:
    import torch
    import torch.distributed as dist

    import trainstep as ts

    size = _shape(size)
    torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        ranks.join(device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = gpt.build(size, device, dropout=0.1)
    plain = loops.pure_step(model, device, microbatches="iter", order="tree")
    step: Any = ts.data_parallel(ts.donate(plain), exact=True)
    state = step.init(model)
    for number in range(STEPS):
        parts = [gpt.batch(size, number * most + part) for part in range(most)][rank::world]
        placed = [{name: t.to(device) for name, t in part.items()} for part in parts]
        state, _ = step(state, placed)
    return ts.digest(state)
