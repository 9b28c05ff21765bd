"""Torch optimizer objects as pure optimizers, and as what scripts look at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support.shell import make_trainer, samples, scored
from trainer.optimizers import adopt, decay_parameter_names, parameter_groups

MAKERS: dict[str, Any] = {
    "AdamW": lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.8, 0.95), amsgrad=True),
    "AdamW fused": lambda g: torch.optim.AdamW(g, lr=0.01, fused=True),
    "Adam": lambda g: torch.optim.Adam(g, lr=0.01, maximize=True),
    "SGD": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda g: torch.optim.RMSprop(g, lr=0.01, centered=True, momentum=0.5),
    "RMSprop foreach": lambda g: torch.optim.RMSprop(g, lr=0.01, momentum=0.5, foreach=True),
    "Adagrad": lambda g: torch.optim.Adagrad(g, lr=0.01),
    "Adamax": lambda g: torch.optim.Adamax(g, lr=0.01),
}
TRANSLATED = {"AdamW", "AdamW fused", "Adam", "SGD", "RMSprop foreach"}


class Kinds(nn.Module):
    """Parameters of every kind that decides about weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.bare = nn.Parameter(torch.zeros(2))
        self.inner = nn.ModuleDict({"norm": nn.Linear(2, 2, bias=False), "ln_f": nn.LayerNorm(2)})
        self.q_norm, self.bn, self.normal = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.MyRMSNorm = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


@pytest.mark.row(17)
def test_biases_and_norms_are_not_decayed() -> None:
    decayed = ["bare", "frozen", "embed.weight", "bn.weight", "normal.weight"]
    assert decay_parameter_names(Kinds()) == decayed
    assert decay_parameter_names(nn.LayerNorm(2)) == []


def test_groups_hold_the_trainable_parameters() -> None:
    first, second = parameter_groups(Kinds(), {"bare", "frozen"}, 0.3)
    assert [p.shape for p in first["params"]] == [(2,)]
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
    assert len(first["params"]) + len(second["params"]) == sum(
        p.requires_grad for p in Kinds().parameters()
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def split(module: nn.Module) -> list[dict[str, Any]]:
    biases = [p for p in module.parameters() if p.ndim == 1]
    others = [p for p in module.parameters() if p.ndim > 1]
    return [{"params": others, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}]


@pytest.mark.parametrize("name", MAKERS)
def test_an_adopted_object_has_the_bits_of_the_object(name: str) -> None:
    mine, reference = net(), net()
    theirs = MAKERS[name](split(reference))
    named = {p: n for n, p in mine.named_parameters()}
    adopted = adopt(MAKERS[name](split(mine)), named)
    params = {n: p.detach() for p, n in named.items()}
    state = adopted.attach(adopted.pure.init(params))

    assert adopted.translated == (name in TRANSLATED)
    for step in range(5):
        draws = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(p.shape, generator=draws) for n, p in params.items()}
        for n, p in reference.named_parameters():
            p.grad = grads[n].clone()
        theirs.step()
        params, state = adopted.pure.apply(params, grads, state, donate=True)
        for n, p in reference.named_parameters():
            assert torch.equal(p, mine.get_parameter(n))
    shown = adopted.object.state_dict()["state"]
    for number, kept in theirs.state_dict()["state"].items():
        for key, value in kept.items():
            if key == "step" and name == "RMSprop foreach":
                continue  # counts and is never used
            assert torch.equal(torch.as_tensor(shown[number][key]), torch.as_tensor(value)), key


@pytest.mark.row(37)
def test_a_foreign_parameter_is_refused() -> None:
    model, other = net(), net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD was built over a parameter of shape \\(3, 4\\)"):
        adopt(optimizer, {p: n for n, p in model.named_parameters()})


def test_a_hook_keeps_the_object_running_itself() -> None:
    model, calls = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    adopted = adopt(optimizer, {p: n for n, p in model.named_parameters()})
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: torch.ones_like(p) for n, p in params.items()}
    adopted.pure.apply(params, grads, adopted.pure.init(params), donate=True)

    assert not adopted.translated
    assert calls == [1]


@pytest.mark.parametrize("name", MAKERS)
def test_own_optimizer_and_scheduler_resume_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def build(folder: Path) -> Any:
        model = scored()
        optimizer = MAKERS[name](split(model))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return make_trainer(
            folder,
            model,
            more={"optimizers": (optimizer, scheduler)},
            save_strategy="steps",
            save_steps=3,
            max_steps=8,
        )

    whole = build(tmp_path / "whole")
    whole.train()
    rates = [r["learning_rate"] for r in whole.state.log_history if "learning_rate" in r]
    assert rates == pytest.approx([0.01 * 0.8**step for step in range(8)])
    assert whole.get_learning_rates() == pytest.approx([0.01 * 0.8**8, 0.05 * 0.8**8])

    resumed = build(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert ts.digest(resumed.train_state.params) == ts.digest(whole.train_state.params)
    assert ts.digest(resumed.train_state) == ts.digest(whole.train_state)


@pytest.mark.row(42)
def test_the_default_optimizer_can_be_looked_at(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored(), max_steps=4, warmup_steps=2, weight_decay=0.1)
    with pytest.raises(ValueError, match="the optimizer does not exist yet"):
        trainer.get_learning_rates()
    trainer.train()

    assert type(trainer.optimizer) is torch.optim.AdamW
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert trainer.lr_scheduler.get_last_lr() == trainer.get_learning_rates() == [0.0, 0.0]
    weight = next(p for p in trainer.model.parameters() if p.ndim > 1)
    name = next(n for n, p in trainer.model.named_parameters() if p is weight)
    assert trainer.get_optimizer_group(name) is trainer.get_optimizer_group(weight)
    moment = trainer.optimizer.state[weight]["exp_avg"]
    assert moment is trainer.train_state.opt_state["group0"]["exp_avg"][name]
    assert trainer.lr_scheduler.lr_lambdas[0].keywords == {
        "num_warmup_steps": 2,
        "num_training_steps": 4,
    }


def test_plateau_moves_with_evaluations_and_resumes(tmp_path: Path) -> None:
    def build() -> Any:
        return make_trainer(
            tmp_path,
            scored(),
            evaluation=samples(6),
            max_steps=8,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=4,
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "mode": "min", "factor": 0.5},
        )

    whole = build()
    whole.train()
    rates = [r["learning_rate"] for r in whole.state.log_history if "learning_rate" in r]
    assert rates[0] > rates[-1] > 0
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again = [r["learning_rate"] for r in resumed.state.log_history if "learning_rate" in r]
    assert again == rates
    assert ts.digest(resumed.train_state) == ts.digest(whole.train_state)
