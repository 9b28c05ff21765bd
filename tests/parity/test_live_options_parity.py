"""What schedulers and callbacks write into ``param_groups`` is what the next update is made with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, CyclicLR, LambdaLR, LRScheduler, OneCycleLR

from support.peer import Side, assert_same_weights, both
from support.shell import logged, scored
from trainer import TrainerCallback

pytest.importorskip("transformers")

Groups = list[dict[str, Any]]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda g: AdamW(g, lr=0.05),
    "AdamW fused": lambda g: AdamW(g, lr=0.05, fused=True, amsgrad=True),
    "SGD": lambda g: SGD(g, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop foreach": lambda g: RMSprop(g, lr=0.01, momentum=0.9, foreach=True),
    "Adagrad": lambda g: Adagrad(g, lr=0.05),  # which runs itself
}


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, 0.1, total_steps=12)


def cyclic(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)


def steady(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A scheduler that leaves rates alone after the first update."""
    return ConstantLR(optimizer, 0.5, total_iters=1)


def function(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


class Writes(TrainerCallback):
    """Calls ``change(groups)`` at an event, at some steps; notes what the groups had before."""

    def __init__(self, event: str, change: Callable[[Groups], Any], steps: Any = (3,)) -> None:
        self.seen: list[Any] = []

        def act(args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            groups = optimizer.param_groups
            self.seen.append([{k: v for k, v in g.items() if k != "params"} for g in groups])
            if state.global_step in steps:
                change(groups)

        setattr(self, f"on_{event}", act)


def setting(**values: Any) -> Callable[[Groups], None]:
    """Return what sets options, in the first group and so that groups differ."""
    return lambda groups: groups[0].update(values)


def trained(
    folder: Path, name: str, scheduler: Any, *callbacks: Any, **changes: Any
) -> tuple[Side, Side]:
    """Train with an own optimizer of two groups; ``callbacks`` make one for each side."""

    def act(trainer: Any) -> Any:
        named = list(trainer.model.named_parameters())
        weights = [p for _, p in named if p.ndim > 1]
        biases = [p for _, p in named if p.ndim == 1]
        trainer.optimizer = OPTIMIZERS[name]([{"params": weights}, {"params": biases}])
        trainer.lr_scheduler = scheduler(trainer.optimizer)
        for make in callbacks:
            trainer.add_callback(make())
        return trainer.train()

    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 1, **changes}
    return both(folder, scored("mlp"), act, **settings)


def assert_same(ours: Side, other: Side) -> None:
    assert_same_weights(ours, other)
    assert logged(ours.trainer, "loss") == logged(other.trainer, "loss")
    groups = [
        [
            {k: v for k, v in group.items() if k != "params"}
            for group in s.trainer.optimizer.param_groups
        ]
        for s in (ours, other)
    ]
    assert groups[0] == groups[1]


@pytest.mark.row(35)
@pytest.mark.parametrize("scheduler", [one_cycle, cyclic])
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD", "RMSprop foreach"])
def test_schedulers_of_the_momentum_are_heard(name: str, scheduler: Any, tmp_path: Path) -> None:
    key = "betas" if name.startswith("Adam") else "momentum"
    watch: list[Writes] = []

    def watching() -> Writes:
        watch.append(Writes("step_begin", lambda groups: None))
        return watch[-1]

    ours, other = trained(tmp_path, name, scheduler, watching)
    assert_same(ours, other)
    assert ours.history == other.history
    assert watch[0].seen == watch[1].seen
    assert len({groups[0][key] for groups in watch[0].seen}) > 3


EVENTS = [
    "train_begin",
    "epoch_begin",
    "step_begin",
    "substep_end",
    "pre_optimizer_step",
    "optimizer_step",
    "step_end",
    "epoch_end",
]


@pytest.mark.row(35)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("scheduler", [steady, function])
def test_what_callbacks_write_is_heard_from_any_event(
    event: str, scheduler: Any, tmp_path: Path
) -> None:
    """At two steps, one of which begins an epoch; the rate is the scheduler's again after an update."""

    def write() -> Writes:
        change = setting(lr=0.3, weight_decay=0.7, betas=(0.5, 0.8), eps=1e-3)
        return Writes(event, change, (0, 3, 5))

    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 3}
    ours, other = trained(tmp_path / "written", "AdamW", scheduler, write, **settings)
    assert_same(ours, other)
    left, _ = trained(tmp_path / "left", "AdamW", scheduler, **settings)
    assert logged(ours.trainer, "loss") != logged(left.trainer, "loss")


CHANGES: dict[str, list[dict[str, Any]]] = {
    "AdamW": [{"lr": 0}, {"betas": [0.1, 0.2]}, {"eps": 0.1}, {"weight_decay": 5}],
    "AdamW fused": [{"lr": 0.0}, {"betas": (0.1, 0.2)}, {"eps": 0.1}, {"weight_decay": 5.0}],
    "SGD": [{"lr": 0.0}, {"momentum": 0.1}, {"weight_decay": 1}],
    "RMSprop foreach": [{"alpha": 0.5}, {"momentum": 0.1}, {"eps": 0.1}, {"weight_decay": 1}],
    "Adagrad": [{"lr": 0.0}, {"eps": 0.1}, {"lr_decay": 0.5}, {"weight_decay": 1}],
}
CASES = [(name, values) for name, several in CHANGES.items() for values in several]


@pytest.mark.row(35)
@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_every_option_is_heard(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    ours, other = trained(
        tmp_path, name, steady, lambda: Writes("step_begin", setting(**values), (4,))
    )
    assert_same(ours, other)
    left, _ = trained(tmp_path / "left", name, steady)
    assert logged(ours.trainer, "loss")[4] == logged(left.trainer, "loss")[4]
    assert logged(ours.trainer, "loss")[5] != logged(left.trainer, "loss")[5]


@pytest.mark.parametrize("name", ["SGD", "RMSprop foreach"])
def test_momentum_that_is_off_for_a_while_goes_on_from_where_it_was(
    name: str, tmp_path: Path
) -> None:
    ours, other = trained(
        tmp_path,
        name,
        steady,
        lambda: Writes("step_begin", setting(momentum=0.0), (2, 3)),
        lambda: Writes("optimizer_step", setting(momentum=0.9), (4,)),
    )
    assert_same(ours, other)


@pytest.mark.row(35)
def test_the_trainers_own_optimizer_hears_too(tmp_path: Path) -> None:
    def act(trainer: Any) -> Any:
        trainer.add_callback(Writes("train_begin", setting(weight_decay=5.0), (0,)))
        trainer.add_callback(Writes("step_begin", setting(lr=0.0), (2, 3)))
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, num_train_epochs=2)
    assert_same(ours, other)
    assert logged(ours.trainer, "learning_rate")[2:4] == [0.0, 0.0]  # theirs tells the scheduler's


def test_what_cannot_be_changed_is_told_once_and_counts_in_the_next_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def act(trainer: Any) -> Any:
        trainer.optimizer = SGD(trainer.model.parameters(), lr=0.05)
        trainer.add_callback(Writes("train_end", setting(maximize=True, momentum=0.9), (5,)))
        trainer.train()
        trainer.add_callback(Writes("step_begin", lambda groups: None))
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), act, learning_rate=0.01)
    assert_same(ours, other)
    assert "has no effect" not in caplog.text

    ours.trainer.add_callback(Writes("step_end", setting(dampening=0.5), (1, 3)))
    ours.trainer.train()
    told = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("SGD: dampening was set to 0.5 during training.")
