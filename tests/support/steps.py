"""Steps of ``support.models`` for tests of lowerings: with dropout, a schedule, clipping and decay."""

from typing import Any

import trainstep as ts
from support import models


def make(
    name: str = "dropout",
    optimizer: ts.Optimizer | None = None,
    device: str = "cpu",
    **options: Any,
) -> tuple[ts.Step, ts.TrainState]:
    """Make a step, and the state to begin with; ``options`` are those of ``make_step``."""
    module = models.build(name).to(device)
    step = ts.make_step(
        ts.module_loss(module, models.mean_loss),
        optimizer or ts.optim.adamw(weight_decay=0.1),
        **{
            "schedule": ts.schedules.cosine(0.1, total_steps=20, warmup_steps=3),
            "transforms": (ts.transforms.clip_by_global_norm(0.5),),
            **options,
        },
    )
    return step, step.init(module, seed=3)
