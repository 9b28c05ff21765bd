"""Hyperparameters of an update, out of an optimizer object's groups."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import trainstep as ts
from support.shell import make_trainer, scored
from trainer import TrainerCallback
from trainer.optimizers import Rates, adopt, make_scheduler


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Rates:
    scheduler = make_scheduler("linear", optimizer, 0, 10, {})
    adopted = adopt(optimizer, {p: n for n, p in model.named_parameters()})
    return Rates(optimizer, scheduler, adopted.options, model.named_parameters)


def two_groups(model: Any, **options: Any) -> torch.optim.AdamW:
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), **options}]
    return torch.optim.AdamW(groups, lr=1.0)


def test_only_rates_are_given_as_long_as_nothing_else_changes() -> None:
    """A recorded update reads rates from the device, and nothing else."""
    model = net()
    rates = rates_of(two_groups(model, lr=0.5, weight_decay=0.3), model)

    assert rates.at(0) == {"lr": 1.0, "group1/lr": 0.5}
    rates.advance(1)
    assert rates.at(1) == {"lr": 0.9, "group1/lr": 0.45}


def test_what_has_changed_is_given_by_group_until_it_is_changed_back() -> None:
    model = net()
    optimizer = two_groups(model)
    rates = rates_of(optimizer, model)
    first, second = optimizer.param_groups
    first["betas"] = [0.9, 0.999]  # the same values
    second["betas"] = (0.9, 0.5)
    second["weight_decay"], second["eps"] = 3, 0.1
    first["lr"] = 0

    given = {"group1/beta2": 0.5, "group1/weight_decay": 3.0, "group1/eps": 0.1}
    assert rates.at(0) == {"lr": 0.0, "group1/lr": 1.0, **given}
    second.update(betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates.advance(1)
    assert rates.at(1) == {"lr": 0.9}


def test_a_group_that_is_added_is_refused_by_name() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    rates = rates_of(optimizer, model)
    optimizer.add_param_group({"params": model[1].parameters()})

    wanted = (
        r"SGD has 2 parameter groups and had 1 .* added: 1\.weight, 1\.bias\. .*before train\(\)"
    )
    with pytest.raises(ValueError, match=wanted):
        rates.at(0)
    with pytest.raises(ValueError, match=wanted):
        rates.advance(1)


def test_a_scheduler_of_another_optimizer_moves_that_one(caplog: pytest.LogCaptureFixture) -> None:
    model, other = net(), torch.optim.SGD(net().parameters(), lr=8.0)
    optimizer = two_groups(model)
    for scheduler in (
        make_scheduler("linear", other, 0, 10, {}),
        LambdaLR(other, lambda step: 1 - step / 10),
    ):
        caplog.clear()
        rates = Rates(optimizer, scheduler)
        rates.check()
        rates.advance(1)
        assert rates.at(1) == {"lr": 1.0}
        assert other.param_groups[0]["lr"] == pytest.approx(7.2)
        rates.restore(rates.state(), 1)
        assert rates.at(1) == {"lr": 1.0}
        assert "LambdaLR was built over another optimizer than the one that trains" in caplog.text


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), 0.5])
def test_what_is_saved_are_pythons_numbers(number: Any) -> None:
    model = net()
    optimizer = two_groups(model)
    rates = rates_of(optimizer, model)
    optimizer.param_groups[1].update(weight_decay=number, betas=(number, 0.5), lr=number)
    written = json.loads(json.dumps(rates.written()))
    assert written == [{}, {"betas": [0.5, 0.5], "weight_decay": 0.5, "lr": 0.5}]
    rates.restore(None, 0, written)
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.5)


class Writes(TrainerCallback):
    """Writes options that stay, and a rate, right before a checkpoint is made."""

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 3:
            optimizer.param_groups[1].update(betas=(0.3, 0.4), weight_decay=2.0)
            optimizer.param_groups[0]["lr"] = 0.7


@pytest.mark.row(35)
@pytest.mark.parametrize("cycle", [False, True])
@pytest.mark.parametrize("form", ["safe", "hf"])
def test_what_was_written_survives_an_interruption(form: str, cycle: bool, tmp_path: Path) -> None:
    def build() -> Any:
        trainer = make_trainer(
            tmp_path,
            scored(),
            callbacks=[Writes()],
            save_strategy="steps",
            save_steps=3,
            max_steps=8,
            checkpoint_format=form,
        )
        optimizer = trainer.create_optimizer()
        if cycle:
            trainer.lr_scheduler = OneCycleLR(optimizer, 0.1, total_steps=9)
        return trainer

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert ts.digest(resumed.train_state) == ts.digest(whole.train_state)
    mine, theirs = (
        [{k: v for k, v in group.items() if k != "params"} for group in t.optimizer.param_groups]
        for t in (resumed, whole)
    )
    assert mine == theirs
