"""What is given to a Trainer after it was built, and trainings of which each trains other parameters."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from support.peer import Side, assert_same_weights, both
from support.shell import logged, scored
from trainer import TrainerCallback

pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "num_train_epochs": 2}


def assert_same(ours: Side, other: Side) -> None:
    assert ours.history == other.history
    assert_same_weights(ours, other)


# ---- schedulers


@pytest.mark.row(35)
@pytest.mark.parametrize("auto", [False, True])
def test_a_scheduler_that_is_assigned_is_used_and_goes_on(auto: bool, tmp_path: Path) -> None:
    def act(trainer: Any) -> Any:
        trainer.create_optimizer()
        trainer.lr_scheduler = CosineAnnealingLR(trainer.optimizer, 15)
        trainer.train()
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, auto_find_batch_size=auto, **SETTINGS)
    assert_same(ours, other)
    rates = logged(ours.trainer, "learning_rate")
    assert rates[0] == pytest.approx(0.0125)  # of the second training
    assert min(rates) == pytest.approx(0.0)


@pytest.mark.row(35, 37)
def test_a_scheduler_that_the_trainer_made_is_made_anew(tmp_path: Path) -> None:
    """Its length would be another one; the same is true of the last training's."""

    def act(trainer: Any) -> Any:
        trainer.create_optimizer_and_scheduler(3)
        trainer.train()
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, **SETTINGS)
    assert_same(ours, other)
    assert min(logged(ours.trainer, "learning_rate")) > 0


@pytest.mark.row(35)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_scheduler_alone_moves_the_optimizer_that_it_has(
    groups: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer's own optimizer has two groups."""

    def act(trainer: Any) -> Any:
        parameters = list(trainer.model.parameters())[:groups]
        foreign = SGD([{"params": [p]} for p in parameters], lr=1.0)
        foreign._opt_called = True  # type: ignore[attr-defined]
        trainer.lr_scheduler = LambdaLR(foreign, lambda step: 0.9**step)
        trainer.train()
        return foreign.param_groups[0]["lr"]

    ours, other = both(tmp_path, scored("mlp"), act, **SETTINGS)
    assert_same_weights(ours, other)
    assert ours.result == other.result == pytest.approx(0.9**10)
    assert "LambdaLR was built over another optimizer than the one that trains" in caplog.text


# ---- parameters


def body(trainer: Any) -> Any:
    """The first layer; the last one is always trained."""
    return trainer.model.body[0]


def of_all(trainer: Any) -> torch.optim.Optimizer:
    return AdamW(trainer.model.parameters(), lr=0.05)


def of_the_last(trainer: Any) -> torch.optim.Optimizer:
    return SGD(trainer.model.body[2].parameters(), lr=0.05, momentum=0.9)


@pytest.mark.row(35)
@pytest.mark.parametrize("order", [(False, True), (True, False), (False, True, False)])
@pytest.mark.parametrize("make", [of_all, of_the_last])
def test_an_own_optimizer_trains_what_it_holds(
    make: Any, order: tuple[bool, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained are, one training after the other, all parameters or those of the last layer."""

    def act(trainer: Any) -> Any:
        trainer.optimizer = make(trainer)
        for trains in order:
            body(trainer).requires_grad_(trains)
            result = trainer.train()
        return result

    ours, other = both(tmp_path, scored("mlp"), act, **SETTINGS)
    assert_same(ours, other)
    assert "group0" in ours.trainer.train_state.opt_state  # by the core's kernels, each time
    told = [r.getMessage() for r in caplog.records if "does not hold" in r.getMessage()]
    if make is of_the_last:
        assert len(told) == 1
        assert told[0].startswith(
            "SGD does not hold body.0.weight, body.0.bias: they are trainable,"
        )
    else:
        assert not told


@pytest.mark.row(28)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_the_trainers_own_optimizer_is_made_over_what_is_trainable(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Moments go on. The peer is told to do the same, which it does not by itself.

    RMSprop runs itself here: its moments begin anew.
    """
    caplog.set_level(logging.INFO, "trainer")

    def act(trainer: Any) -> Any:
        body(trainer).requires_grad_(False)
        trainer.train()
        body(trainer).requires_grad_(True)
        if not hasattr(trainer, "train_state"):
            before = trainer.optimizer.optimizer
            trainer.optimizer = None
            after = trainer.create_optimizer()
            if optim != "rmsprop":
                after.state.update(before.state)
        return trainer.train()

    more: dict[str, Any] = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    ours, other = both(tmp_path, scored("mlp"), act, optim=optim, **more, **SETTINGS)
    assert_same(ours, other)
    assert caplog.text.count("is made over them") == 1
    assert not torch.equal(body(ours.trainer).weight, scored("mlp").body[0].weight)


class Switch(TrainerCallback):
    """Freezes the first layer when training begins, and trains it from an epoch on."""

    def __init__(self, epoch: int, begins: bool = True) -> None:
        self.epoch, self.begins = epoch, begins

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.begins:
            model.body[0].requires_grad_(False)

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if round(state.epoch) >= self.epoch:
            model.body[0].requires_grad_(True)


@pytest.mark.row(35)
def test_what_is_frozen_when_training_has_begun_can_be_trained_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def act(trainer: Any) -> Any:
        trainer.add_callback(Switch(1))
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, **SETTINGS)
    assert_same(ours, other)
    assert "Frozen when training began" not in caplog.text
    assert not torch.equal(body(ours.trainer).weight, scored("mlp").body[0].weight)


def test_what_was_frozen_before_training_began_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And is trained by the next training."""

    def act(trainer: Any) -> Any:
        body(trainer).requires_grad_(False)
        trainer.add_callback(Switch(1, begins=False))
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, **{**SETTINGS, "num_train_epochs": 3})
    first = body(ours.trainer).weight.detach().clone()
    assert torch.equal(first, scored("mlp").body[0].weight)
    # The peer's optimizer does not have it either; it only counts in the norm that is clipped to.
    assert torch.equal(first, body(other.trainer).weight)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Frozen when")]
    assert len(told) == 1
    assert "not trained by this training: body.0.weight, body.0.bias. Begin with" in told[0]
    ours.trainer.train()
    assert not torch.equal(first, body(ours.trainer).weight)


class Adds(TrainerCallback):
    """Gives the optimizer the first layer when an epoch begins."""

    def on_epoch_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        model.body[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model.body[0].parameters())})


def test_a_group_that_a_callback_adds_is_refused(tmp_path: Path) -> None:
    """By the peer as well, in its scheduler and not as clearly."""

    def act(trainer: Any) -> Any:
        body(trainer).requires_grad_(False)
        trainer.add_callback(Adds())
        with pytest.raises(ValueError) as error:
            trainer.train()
        return str(error.value)

    ours, other = both(tmp_path, scored("mlp"), act, **SETTINGS)
    assert "added: body.0.weight, body.0.bias." in ours.result
    assert "zip()" in other.result

    trainer = ours.trainer
    trainer.remove_callback(Adds)
    before = body(trainer).weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, body(trainer).weight)
    assert len(trainer.optimizer.param_groups) == 3
