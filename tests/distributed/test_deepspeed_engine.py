"""What is done around DeepSpeed's engine, with one that stands in for it; DeepSpeed is not needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainstep as ts
from support.shell import make_trainer, scored
from trainer.distributed import deepspeed_contexts
from trainer.distributed.deepspeed_engine import DeepSpeedStep
from trainer.distributed.deepspeed_plan import Zero
from trainer.engine import no_loss
from trainer.optimizers import Rates


def zero_of(engine: Any, **config: Any) -> Zero:
    """DeepSpeed's part in a trainer, with an engine."""
    return Zero({"zero_optimization": {"stage": 2}, **config}, engine, trains=True)


@pytest.mark.parametrize("norm", [None, float("inf"), torch.tensor(2.0, dtype=torch.float64)])
def test_norms_are_where_losses_are(norm: Any) -> None:
    """The device is meta, which every CPU has beside itself: numbers alone would be on the host."""
    place = torch.device("meta")
    if isinstance(norm, torch.Tensor):
        norm = norm.to(place)
    engine = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda: norm)
    module = scored("mlp")
    rates = Rates(torch.optim.SGD(module.parameters(), lr=0.1), None)
    trainer: Any = SimpleNamespace(_zero=zero_of(engine), _rates=rates)
    step = DeepSpeedStep(trainer, ts.make_step(no_loss, ts.optim.sgd()))
    state = ts.TrainState(0, {}, {}, (), ts.rng.key(0))
    _, metrics = step.finish(state, ts.Loss(torch.zeros((), device=place)))
    assert metrics["grad_norm"].device == place
    assert metrics["grad_norm"].dtype == torch.float32
    torch.stack([metrics["grad_norm"], metrics["loss"]])


def test_a_dropped_engine_gives_the_optimizer_its_parameters_back() -> None:
    own = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD([{"params": [one]} for one in own], lr=0.1, momentum=0.5)
    zero = zero_of(SimpleNamespace(destroy=lambda: None))
    zero.given = optimizer, [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [torch.ones(9)]
        optimizer.state[group["params"][0]] = {"momentum_buffer": torch.ones(9)}
    deepspeed_contexts.drop(zero)
    assert (zero.engine, zero.trains, zero.given) == (None, False, None)
    assert [group["params"][0] for group in optimizer.param_groups] == own
    assert not optimizer.state


def test_labels_keep_their_type(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path)
    trainer._zero = zero_of(object(), bf16={"enabled": True})
    batch = {"x": torch.ones(1, 4), "labels": torch.ones(1, 2), "deep": [{"x": torch.ones(1)}]}
    prepared = trainer._prepare_inputs(batch)
    assert prepared["labels"].dtype == torch.float32
    assert prepared["x"].dtype == prepared["deep"][0]["x"].dtype == torch.bfloat16
