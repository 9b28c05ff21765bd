"""``get_scheduler`` and its kin give upstream's rates, and their objects work in a Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

import trainer
from support.shell import At, Killed, kill, logged, make_trainer, scored
from trainer.arguments import SchedulerType
from trainer.optimizers import functions

STEPS = 12
CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("get_constant_schedule", (), {}),
    ("get_constant_schedule_with_warmup", (3,), {}),
    ("get_linear_schedule_with_warmup", (3, STEPS), {}),
    ("get_cosine_schedule_with_warmup", (3, STEPS), {"num_cycles": 1.5}),
    ("get_cosine_with_hard_restarts_schedule_with_warmup", (2, STEPS), {"num_cycles": 2}),
    ("get_polynomial_decay_schedule_with_warmup", (2, STEPS), {"lr_end": 0.01, "power": 2.0}),
    ("get_inverse_sqrt_schedule", (2,), {}),
    ("get_inverse_sqrt_schedule", (2,), {"timescale": 5}),
    ("get_cosine_with_min_lr_schedule_with_warmup", (2, STEPS), {"min_lr": 0.01}),
    ("get_cosine_with_min_lr_schedule_with_warmup", (2, STEPS), {"min_lr_rate": 0.3}),
    (
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        (3, STEPS),
        {"min_lr": 0.01, "warmup_lr_rate": 0.2},
    ),
    ("get_wsd_schedule", (2, 4, STEPS), {"decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("get_wsd_schedule", (2, 4), {"num_stable_steps": 3, "warmup_type": "cosine"}),
]


def optimizer() -> SGD:
    return SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def rates(made: Any, given: SGD) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(given.param_groups[0]["lr"])
        given.step()
        made.step()
    return found


@pytest.mark.row(38)
@pytest.mark.parametrize(("name", "steps", "options"), CASES, ids=str)
def test_the_rates_are_upstreams(
    name: str, steps: tuple[int, ...], options: dict[str, Any]
) -> None:
    theirs = getattr(pytest.importorskip("transformers"), name)
    ours = getattr(trainer, name)
    mine, other = optimizer(), optimizer()
    expected = rates(theirs(other, *steps, **options), other)
    assert rates(ours(mine, *steps, **options), mine) == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize("name", functions.__all__)
def test_parameters_are_upstreams(name: str) -> None:
    import inspect

    theirs = getattr(pytest.importorskip("transformers"), name)
    ours = getattr(trainer, name)
    assert getattr(trainer.optimization, name) is ours
    if name == "GreedyLR":
        return  # its options are those of the core's schedule
    mine, given = (inspect.signature(f).parameters for f in (ours, theirs))
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in given.values()
    ]


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_name_is_known(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"warmup_stable_decay": {"num_decay_steps": 4}}.get(name, {})
    options |= {"min_lr": 0.01} if "min_lr" in name else {}
    made = []
    for library in (trainer, transformers):
        given = optimizer()
        scheduler = library.get_scheduler(name, given, 2, STEPS, options)
        if name in ("reduce_lr_on_plateau", "greedy"):
            scheduler.step(1.0)
            made.append([given.param_groups[0]["lr"]])
        else:
            made.append(rates(scheduler, given))
    assert made[0] == pytest.approx(made[1], abs=1e-12, rel=0)


def test_what_is_missing_or_unknown_is_said() -> None:
    with pytest.raises(ValueError, match="linear needs num_warmup_steps and num_training_steps"):
        trainer.get_scheduler("linear", optimizer())
    with pytest.raises(ValueError, match=r"inverse_sqrt needs num_warmup_steps$"):
        trainer.get_scheduler("inverse_sqrt", optimizer())
    with pytest.raises(ValueError, match="give total_steps or stable_steps"):
        trainer.get_wsd_schedule(optimizer(), 2, 4)
    with pytest.raises(ValueError, match="linear"):  # lists the valid ones
        trainer.get_scheduler("linnear", optimizer(), 1, 2)
    with pytest.raises(TypeError, match="cosine does not take 'cycles'"):
        trainer.get_scheduler("cosine", optimizer(), 1, 2, {"cycles": 1})


def test_a_schedule_can_begin_in_the_middle() -> None:
    given = optimizer()
    given.param_groups[0]["initial_lr"] = 0.1
    scheduler = trainer.get_linear_schedule_with_warmup(given, 0, 10, last_epoch=4)
    assert scheduler.get_last_lr() == [pytest.approx(0.05)]


def pair(folder: Path, **changes: Any) -> Any:
    model = scored("mlp")
    given = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = trainer.get_cosine_schedule_with_warmup(given, 2, 6)
    return make_trainer(
        folder, model, more={"optimizers": (given, schedule)}, max_steps=6, **changes
    )


def test_a_trainer_computes_the_rates_of_a_schedule_that_it_is_given(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = pair(tmp_path / "whole", **saving)
    whole.train()
    cut = pair(tmp_path / "cut", **saving, callbacks=[At("step_end", 3, kill)])
    with pytest.raises(Killed):
        cut.train()
    again = pair(tmp_path / "cut", **saving)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "learning_rate") == logged(whole, "learning_rate")
    assert logged(whole, "learning_rate")[:3] == [0.0, 0.05, 0.1]
