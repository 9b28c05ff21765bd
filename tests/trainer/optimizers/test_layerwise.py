"""One optimizer per parameter, stepped inside the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support import libraries
from support.shell import At, Killed, Scored, kill, logged, make_trainer, scored, timeless, weights
from trainer import Trainer
from trainer.optimizers import LayerwiseOptimizer, adopt

CHOICE = {"optim_target_modules": "all-linear", "optim_args": "rank=2,update_proj_gap=2"}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.pretend(monkeypatch)


def trained(folder: Path, model: Any = None, **changes: Any) -> Any:
    model = scored("mlp") if model is None else model
    trainer = make_trainer(folder, model, **(CHOICE | changes))
    trainer.train()
    return trainer


def pair() -> tuple[nn.Module, LayerwiseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [
        {"params": [*model[0].parameters()], "lr": 0.1},
        {"params": [*model[1].parameters()], "weight_decay": 0.5},
    ]
    return model, LayerwiseOptimizer(groups, torch.optim.AdamW, lr=0.01)


def test_it_has_the_bits_of_one_optimizer_over_all_groups() -> None:
    (model, mine), (other, _) = pair(), pair()
    whole = torch.optim.AdamW(
        [
            {"params": [*other[0].parameters()], "lr": 0.1},
            {"params": [*other[1].parameters()], "weight_decay": 0.5},
        ],
        lr=0.01,
    )
    for step in range(3):
        for optimizer, net in ((mine, model), (whole, other)):
            optimizer.param_groups[1]["lr"] = 0.5 / (step + 1)
            net(torch.full((2, 3), float(step))).sum().backward()
        for parameter in model.parameters():
            mine.update(parameter)
            parameter.grad = None
        mine.step()  # nothing is left to do
        whole.step()
        whole.zero_grad()

    assert ts.equal(model.state_dict(), other.state_dict())
    assert all(
        ts.equal(mine.state[p], whole.state[q])
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_its_state_can_be_loaded() -> None:
    (model, first), (_, second) = pair(), pair()
    model(torch.ones(2, 3)).sum().backward()
    for parameter in model.parameters():
        first.update(parameter)
    second.load_state_dict(first.state_dict())

    assert second.state_dict()["state"].keys() == {0, 1, 2, 3}
    target = second.param_groups[0]["params"][0]
    target.grad = torch.ones_like(target)
    second.update(target)
    assert int(second.state[target]["step"]) == 2


@pytest.mark.parametrize("kind", ["galore_adamw", "apollo_adamw"])
def test_training_has_the_bits_of_the_optimizer_without_clipping(kind: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", optim=kind, max_grad_norm=0)
    layerwise = trained(tmp_path / "layerwise", optim=f"{kind}_layerwise")

    assert isinstance(layerwise.optimizer, LayerwiseOptimizer)
    assert ts.equal(weights(layerwise), weights(plain))
    moments = [
        {name: kept["velocity"] for name, kept in trainer.train_state.opt_state["state"].items()}
        for trainer in (layerwise, plain)
    ]
    assert ts.equal(*moments)
    for key in ("loss", "learning_rate"):
        assert logged(layerwise, key) == logged(plain, key)
    assert logged(layerwise, "learning_rate") == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])
    assert logged(layerwise, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-6)


def test_no_gradient_outlives_the_backward_pass(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(Trainer):
        def training_step(self, *arguments: Any) -> Tensor:
            loss = super().training_step(*arguments)
            seen.extend(p.grad is None for p in self.model.parameters())
            return loss

    model = scored("mlp")
    trainer = make_trainer(
        tmp_path, model, make=Watching, optim="galore_adamw_layerwise", max_steps=2, **CHOICE
    )
    trainer.train()
    assert seen == [True] * (2 * len(list(model.parameters())))


@pytest.mark.parametrize("crash", [False, True])
def test_outside_of_training_a_backward_pass_changes_nothing(crash: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"), optim="galore_adamw_layerwise", **CHOICE)
    if crash:
        trainer.add_callback(At("step_end", 2, kill))
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train()
    before = weights(trainer)
    trainer.model(torch.ones(2, 4), torch.ones(2, 2))["loss"].backward()

    assert ts.equal(weights(trainer), before)
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_a_second_training_goes_on_with_the_moments(tmp_path: Path) -> None:
    results = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        trainer = trained(tmp_path / name, optim=name, max_grad_norm=0)
        trainer.train()
        results.append(trainer)
    assert ts.equal(weights(results[1]), weights(results[0]))
    assert logged(results[1], "learning_rate")[0] == 0.05


class Hungry(Scored):
    """Runs out of memory in the third batch of more than 3 samples."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.large = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.large += len(x) > 3
        if self.large == 3:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x, labels)


def test_an_attempt_at_another_batch_size_starts_with_fresh_hooks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": "galore_adamw_layerwise", "max_steps": 4}
    trainer = trained(
        tmp_path / "found",
        scored("mlp", Hungry),
        per_device_train_batch_size=3,
        auto_find_batch_size=True,
        **settings,
    )
    assert trainer.train_state.step == 4
    size = {"per_device_train_batch_size": trainer._train_batch_size}
    alone = trained(tmp_path / "alone", scored("mlp"), **settings, **size)
    assert ts.equal(weights(trainer), weights(alone))


class Moving(torch.optim.SGD):
    """Gives its parameters other memory in every step, as GaLore's 8-bit class does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.clone()
        super().step()


@pytest.mark.parametrize("layerwise", [False, True])
def test_parameters_stay_the_state_s_whatever_the_optimizer_does(
    layerwise: bool, tmp_path: Path
) -> None:
    chosen: tuple[Any, dict[str, Any]] = (Moving, {"lr": 0.1})
    model, plain = scored("mlp"), scored("mlp")
    if layerwise:
        groups = [{"params": [*model.parameters()]}]
        chosen = (LayerwiseOptimizer, {"params": groups, "optimizer_cls": Moving, "lr": 0.1})
    trainer = make_trainer(
        tmp_path / "a", model, more={"optimizer_cls_and_kwargs": chosen}, max_grad_norm=0
    )
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.data_ptr() == trainer.train_state.params[name].data_ptr()

    sgd = (torch.optim.SGD, {"lr": 0.1})
    other = make_trainer(
        tmp_path / "b", plain, more={"optimizer_cls_and_kwargs": sgd}, max_grad_norm=0
    )
    other.train()
    assert ts.equal(weights(trainer), weights(other))


def test_an_object_of_one_s_own_is_checked_when_it_is_used(tmp_path: Path) -> None:
    model = scored("mlp")
    groups = [{"params": [*model.parameters()]}]
    mine = LayerwiseOptimizer(groups, torch.optim.SGD, lr=0.1)
    trainer = make_trainer(tmp_path, model, more={"optimizers": (mine, None)}, on_nonfinite="skip")
    with pytest.raises(
        ValueError, match=r"LayerwiseOptimizer updates inside the backward pass, so"
    ):
        trainer.train()


def test_its_updates_are_those_of_named_parameters_only() -> None:
    model, mine = pair()
    adopted = adopt(mine, {p: n for n, p in model.named_parameters()})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert adopted.fused is not None
    with adopted.updating():
        model(torch.ones(1, 3)).sum().backward()
    norms = adopted.fused.collect()

    assert norms.keys() == before.keys()
    assert float(norms["1.bias"]) == 1.0
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert adopted.fused.collect() == {}


def test_the_records_are_those_of_a_resumed_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, optim="apollo_adamw_layerwise", **settings)
    resumed = make_trainer(
        tmp_path, scored("mlp"), optim="apollo_adamw_layerwise", **(CHOICE | settings)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
