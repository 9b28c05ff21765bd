"""Exact reduction in one process: the tree of the core, whatever the micro-batches' sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support.shell import Scored, logged, make_trainer, samples, scored
from trainer import TrainerCallback
from trainer.distributed.reduce import check_power_of_two
from trainer.distributed.windows import tree_order
from trainstep.grads import sum_gradients


class Watch(TrainerCallback):
    """Keeps the gradients of the first update, and its micro-batches."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.substeps = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.substeps += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            named = kwargs["model"].named_parameters()
            self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("n", [2, 5, 8, 10, 13, 16])
def test_gradients_are_the_cores_in_tree_order(n: int, tmp_path: Path) -> None:
    model, data, watch = scored("dropout"), samples(n), Watch()
    before = ts.init(model, ts.optim.sgd(), seed=42)
    trainer = make_trainer(
        tmp_path,
        model,
        train=data,
        callbacks=[watch],
        gradient_accumulation_steps=8,
        exact_reduction=True,
        max_grad_norm=0,
    )
    order = [key[1] for keys in trainer.get_train_dataloader().batch_sampler for key in keys]
    batches = [
        {k: torch.stack([data[i][k] for i in order[at : at + 2]]) for k in ("x", "labels")}
        for at in range(0, n, 2)
    ]
    trainer.train()

    loss_fn = ts.module_loss(model, lambda call, batch: weighed(call, batch))
    key = before.key.fold_in(0, 0)
    sums = sum_gradients(loss_fn, before.params, {}, batches, key, order="tree")
    loss, grads = sums.mean()
    assert watch.substeps == len(batches) - 1
    assert watch.grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.equal(watch.grads[name], grad), name
    assert logged(trainer, "loss") == [loss.value.item()]


def weighed(call: Any, batch: Any) -> ts.Loss:
    """Count a batch of two as 1, as the engine does: halves and doubles are exact."""
    weight = len(batch["x"])
    return ts.Loss(call(**batch)["loss"] * weight, weight)


def test_the_order_of_the_tree() -> None:
    assert tree_order(range(8)) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert tree_order(range(3)) == [0, 2, 1]
    assert tree_order(range(0)) == []


@pytest.mark.parametrize("size", [3, 6, 12])
def test_other_numbers_of_processes_are_refused(size: int) -> None:
    for fine in (1, 2, 4, 8, 1024):
        check_power_of_two(fine)
    with pytest.raises(
        ValueError, match=rf"needs 1, 2, 4, 8, ... processes; got {size}\. Launch a"
    ):
        check_power_of_two(size)


class Counting(Scored):
    """Has a buffer that every forward pass changes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.passes += 1
        return super().forward(x, labels)


def test_running_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"depend on who sees which batch: body\..*GroupNorm"):
        make_trainer(tmp_path, scored("batch_norm"), exact_reduction=True).train()
    with pytest.raises(ValueError, match="depend on who sees which batch: passes"):
        make_trainer(tmp_path, scored("mlp", Counting), exact_reduction=True).train()


def test_resuming_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "exact_reduction": True}
    options |= {"train": samples(22), "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, scored("dropout"), **options)
    whole.train()
    again = make_trainer(tmp_path, scored("dropout"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ts.digest(again.train_state) == ts.digest(whole.train_state)


def test_an_update_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    data = samples(8)
    data[3]["x"] = data[3]["x"] * float("nan")
    trainer = make_trainer(
        tmp_path, scored("mlp"), train=data, exact_reduction=True, on_nonfinite="skip"
    )
    trainer.train()
    assert int(trainer.train_state.extras["skipped"]) == 1
    assert all(p.isfinite().all() for p in trainer.train_state.params.values())
