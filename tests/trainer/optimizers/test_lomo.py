"""LOMO: updates inside the backward pass, made by the model's own hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import libraries
from support.shell import logged, make_trainer, scored, weights
from trainer import Trainer


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.pretend(monkeypatch, "lomo_optim")


def test_it_is_plain_descent_at_the_schedule_s_rate(tmp_path: Path) -> None:
    lomo = make_trainer(tmp_path / "lomo", scored("mlp"), optim="lomo")
    lomo.train()
    plain = make_trainer(tmp_path / "sgd", scored("mlp"), optim="sgd", max_grad_norm=0)
    plain.train()

    assert lomo.optimizer.rates == logged(plain, "learning_rate") == logged(lomo, "learning_rate")
    torch.testing.assert_close(weights(lomo), weights(plain))
    assert logged(lomo, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    assert logged(lomo, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


def test_the_library_s_class_has_the_bits_of_plain_descent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    pytest.importorskip("lomo_optim")
    lomo = make_trainer(tmp_path / "lomo", scored("mlp"), optim="lomo")
    lomo.train()
    plain = make_trainer(tmp_path / "sgd", scored("mlp"), optim="sgd", max_grad_norm=0)
    plain.train()
    assert ts.equal(weights(lomo), weights(plain))


def test_outside_of_training_a_backward_pass_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"), optim="lomo")

    def backward() -> None:
        before = weights(trainer)
        trainer.model.zero_grad()
        trainer.model(torch.ones(2, 4), torch.ones(2, 2))["loss"].backward()
        assert ts.equal(weights(trainer), before)
        assert all(p.grad is not None for p in trainer.model.parameters())

    assert trainer.train_state.step == 0  # the optimizer exists from here on
    backward()
    trainer.train()
    backward()


class Imperative(Trainer):
    """A training step as older scripts write it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)


def test_an_overridden_step_runs_the_pass_through_accelerate(tmp_path: Path) -> None:
    ours = make_trainer(tmp_path / "a", scored("mlp"), optim="lomo")
    ours.train()
    theirs = make_trainer(tmp_path / "b", scored("mlp"), make=Imperative, optim="lomo")
    theirs.train()
    assert ts.equal(weights(ours), weights(theirs))


def test_a_pass_that_is_not_lomo_s_is_refused(tmp_path: Path) -> None:
    class Plain(Imperative):
        def backward(self, loss: Tensor) -> None:
            self.optimizer.rates.append(0.0)  # type: ignore[union-attr]
            loss.backward()

    trainer = make_trainer(tmp_path, scored("mlp"), make=Plain, optim="lomo")
    with pytest.raises(
        ValueError, match=r"Lomo updates inside its own backward pass, and there are"
    ):
        trainer.train()


def test_each_micro_batch_is_an_update_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, scored("mlp"), optim="lomo", gradient_accumulation_steps=2, weight_decay=0.1
    )
    trainer.train()  # of 5 micro-batches
    assert trainer.optimizer.rates == pytest.approx([0.05, 0.05, 0.1 / 3, 0.1 / 3, 0.05 / 3])
    assert "each of the 2 micro-batches makes an update" in caplog.text
    assert "optim='lomo': weight_decay is not applied" in caplog.text


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_a_loss_scale_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"optim='{name}' updates inside .* fp16=True cannot work"):
        make_trainer(tmp_path, optim=name, fp16=True)


def test_an_object_of_one_s_own_is_run_the_same_way(tmp_path: Path) -> None:
    model = scored("mlp")
    mine = libraries.Lomo(model, lr=0.05)
    own = make_trainer(tmp_path / "a", model, more={"optimizers": (mine, None)})
    own.train()
    named = make_trainer(tmp_path / "b", scored("mlp"), optim="lomo")
    named.train()
    assert ts.equal(weights(own), weights(named))
