"""Gradients through the live module."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import models
from support.shell import At, Killed, kill, make_trainer, samples, scored, weights
from trainer import Trainer
from trainer.engine import LocalEngine, describe


def test_gradients_add_up_until_they_are_collected(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"))
    engine = LocalEngine(trainer, trainer.train_state)
    batches = [models.batch(3, seed=i) for i in range(2)]
    inputs = [{"x": b["x"], "labels": b["y"]} for b in batches]

    shares = [engine.backward(batch, None, 2) for batch in inputs]
    grads = engine.collect()

    fresh = scored("mlp")
    total = sum(fresh(**batch)["loss"] / 2 for batch in inputs)
    total.backward()
    assert float(sum(shares)) == pytest.approx(total.item(), rel=1e-6)
    assert not any(share.requires_grad for share in shares)
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    assert all(p.grad is not None for p in trainer.model.parameters())
    engine.drop()
    assert all(p.grad is None for p in trainer.model.parameters())


def test_parameters_that_the_loss_does_not_reach_have_no_gradient(tmp_path: Path) -> None:
    model = scored("mlp")
    model.spare = torch.nn.Parameter(torch.ones(2))
    trainer = make_trainer(tmp_path, model, weight_decay=0.5)
    trainer.train()

    assert torch.equal(model.spare, torch.ones(2))


def test_gradients_left_by_an_interrupted_training_are_forgotten(tmp_path: Path) -> None:
    clean = make_trainer(tmp_path / "clean", scored("mlp"))
    clean.train()
    trainer = make_trainer(
        tmp_path / "broken",
        scored("mlp"),
        callbacks=[At("pre_optimizer_step", 0, kill)],
        gradient_accumulation_steps=1,
    )
    with pytest.raises(Killed):
        trainer.train()
    for parameter in trainer.model.parameters():
        assert parameter.grad is None
        parameter.grad = torch.ones_like(parameter)  # as the caller may have left some
    trainer.train()

    for name, tensor in weights(clean).items():
        assert torch.equal(tensor, weights(trainer)[name]), name


def test_a_failing_model_is_told_apart_by_batch_and_step(tmp_path: Path) -> None:
    data = [*samples(2), {"x": torch.zeros(5), "labels": torch.zeros(2)}]
    trainer = make_trainer(
        tmp_path,
        scored("mlp"),
        train=data,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        trainer.train()

    assert raised.value.__notes__ == [
        "while training on the batch {x: (1, 5) float32, labels: (1, 2) float32} at step 2"
    ]


class NoBackward(Trainer):
    """An override that forgets to call backward."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return self.compute_loss(model, inputs).detach()


def test_an_override_that_makes_no_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter received a gradient.*must call backward"):
        make_trainer(tmp_path, make=NoBackward).train()


class ByHand(Trainer):
    """Makes the update itself, in the micro-batches from ``first`` on."""

    first = 1

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step + 1 >= self.first:
            assert self.optimizer is not None
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad"])
def test_an_override_that_makes_the_update_itself_is_refused(
    first: int, optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByHand, "first", first)
    trainer = make_trainer(tmp_path, make=ByHand, optim=optim)
    with pytest.raises(
        ValueError, match=r"which called optimizer\.step\(\) and zero_grad\(\) itself"
    ):
        trainer.train()
    assert trainer.state.global_step == first - 1


class Doubling(Trainer):
    """An override whose gradients are twice the usual ones."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for parameter in model.parameters():
            parameter.grad *= 2
        return loss


def test_an_overridden_training_step_is_what_trains(tmp_path: Path) -> None:
    options = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    usual = make_trainer(tmp_path / "a", scored("mlp"), learning_rate=0.1, **options)
    doubled = make_trainer(
        tmp_path / "b", scored("mlp"), make=Doubling, learning_rate=0.05, **options
    )
    usual.train()
    doubled.train()

    for name, tensor in weights(usual).items():
        torch.testing.assert_close(weights(doubled)[name], tensor)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(2, 3), "(2, 3) float32"),
        ({"a": torch.zeros(2, dtype=torch.int64), "b": "x"}, "{a: (2,) int64, b: str}"),
        ([torch.zeros(()), (np.zeros(2),)], "[() float32, [ndarray]]"),
        ([1] * 9, "[" + ", ".join(["int"] * 8) + "]"),
    ],
)
def test_batches_are_described(batch: Any, text: str) -> None:
    assert describe(batch) == text
