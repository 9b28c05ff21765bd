"""Checkpoints across the two trainers: each goes on from what the other saved, to the same bits."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support.peer import texts, theirs, tiny
from support.shell import Normed, logged, make_trainer, samples, scored, weights
from trainer import checkpoint

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def tokens(kind: str) -> dict[str, Any]:
    return {"model": lambda: tiny(kind), "train": texts(8), "evaluation": texts(4, seed=1)}


CASES: dict[str, dict[str, Any]] = {
    "adamw with two groups": {"model": lambda: scored(Normed), "weight_decay": 0.1},
    "accumulating": {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
    "not fused": {"optim": "adamw_torch", "warmup_steps": 3},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop"},
    "adagrad": {"optim": "adagrad"},
    "adafactor": {"optim": "adafactor"},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    },
    "tied weights": tokens("gpt2"),
    "llama": tokens("llama"),
}


def build(make: Any, folder: Path, case: dict[str, Any], **changes: Any) -> Any:
    """Build one of the two trainers for a run of two epochs."""
    settings = {"train": samples(8), "num_train_epochs": 2, **case, **changes}
    model = settings.pop("model", lambda: scored("mlp"))()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(folder, model, **settings)


def train(trainer: Any, resume: Path | bool | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = str(resume) if isinstance(resume, Path) else resume
        return trainer.train(resume_from_checkpoint=wanted)


def assert_same_weights(a: Any, b: Any) -> None:
    mine, given = weights(a), weights(b)
    assert mine.keys() == given.keys()
    different = [name for name in mine if not torch.equal(mine[name], given[name])]
    assert not different, different


@pytest.mark.parametrize("name", CASES)
def test_theirs_goes_on_from_ours(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = build(theirs, tmp_path / "whole", case)
    train(whole)
    ours = build(
        make_trainer,
        tmp_path / "ours",
        case,
        checkpoint_format="hf",
        save_strategy="steps",
        save_steps=1,
    )
    train(ours)
    points = checkpoint.list_checkpoints(tmp_path / "ours")
    assert len(points) == whole.state.max_steps
    for point in (points[0], points[len(points) // 2]):
        other = build(theirs, tmp_path / "other", case)
        train(other, point)
        assert_same_weights(other, whole)
        assert logged(other, "loss") == logged(whole, "loss")


@pytest.mark.parametrize("name", CASES)
def test_ours_goes_on_from_theirs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = build(theirs, tmp_path / "whole", case, save_strategy="steps", save_steps=1)
    train(whole)
    plain = build(make_trainer, tmp_path / "plain", case)
    train(plain)
    points = checkpoint.list_checkpoints(tmp_path / "whole")
    for point in points:
        assert checkpoint.verify(point) == []
    for point in (points[0], points[len(points) // 2], points[-1]):
        ours = build(make_trainer, tmp_path / "ours", case)
        result = train(ours, point)
        assert_same_weights(ours, whole)
        assert logged(ours, "loss") == logged(whole, "loss")
        assert ts.digest(ours.train_state) == ts.digest(plain.train_state)
        assert result.training_loss == pytest.approx(plain.state.log_history[-1]["train_loss"])


def test_there_and_back_again(tmp_path: Path) -> None:
    """Four sessions of two steps, by turns, each from what the one before saved."""
    case = CASES["adamw with two groups"]
    whole = build(theirs, tmp_path / "whole", case)
    train(whole)
    saving = {"save_strategy": "steps", "save_steps": 1}
    resume = None
    for number, make in enumerate((make_trainer, theirs, make_trainer, theirs)):
        extra = {"checkpoint_format": "hf"} if make is make_trainer else {}
        trainer = build(make, tmp_path / "run", case, **saving, **extra)
        train(trainer, resume)
        resume = tmp_path / "run" / f"checkpoint-{2 * number + 2}"
        for later in checkpoint.list_checkpoints(tmp_path / "run"):
            if later.name > resume.name:  # as if the run had ended there
                for file in later.iterdir():
                    file.unlink()
                later.rmdir()
    assert_same_weights(trainer, whole)


def test_dropout_is_ours_from_the_step_on(tmp_path: Path) -> None:
    """Theirs draws from a stream that goes on, ours from the step: both resume, each in its own way."""
    case = {"model": lambda: scored("dropout")}
    whole = build(theirs, tmp_path / "whole", case, save_strategy="steps", save_steps=2)
    train(whole)
    runs = [build(make_trainer, tmp_path / run, case) for run in "ab"]
    for trainer in runs:
        train(trainer, tmp_path / "whole" / "checkpoint-4")
    assert_same_weights(*runs)
    assert logged(runs[0], "loss")[:4] == logged(whole, "loss")[:4]
    assert logged(runs[0], "loss")[4:] != logged(whole, "loss")[4:]


def test_only_a_model(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    source = build(theirs, tmp_path / "theirs", {}, **saving)
    train(source)
    trainer = build(make_trainer, tmp_path / "ours", {})
    assert train(trainer, tmp_path / "theirs" / "checkpoint-4").global_step == 8
    ours = build(make_trainer, tmp_path / "ours", {}, **saving, checkpoint_format="hf")
    train(ours)
    other = build(theirs, tmp_path / "other", {})
    assert train(other, tmp_path / "ours" / "checkpoint-4").global_step == 8


def test_a_folder_that_theirs_left_half_written_is_passed_over(tmp_path: Path) -> None:
    """Theirs takes the highest number, whatever is in it."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = build(theirs, tmp_path / "run", {}, **saving)
    train(whole)
    (tmp_path / "run" / "checkpoint-8" / "trainer_state.json").unlink()
    ours = build(make_trainer, tmp_path / "run", {})
    ours.train(resume_from_checkpoint=True)
    assert_same_weights(ours, whole)
    again = build(theirs, tmp_path / "run", {})
    with pytest.raises(FileNotFoundError):
        train(again, True)


def test_a_state_dict_is_that_of_the_same_optimizer(tmp_path: Path) -> None:
    """Not only equal behaviour: the same keys, in the same places, with the same bits."""
    case = CASES["adamw with two groups"]
    saving = {"save_strategy": "steps", "save_steps": 3}
    model = case["model"]()
    for make, folder in ((theirs, "theirs"), (make_trainer, "ours")):
        more = {"checkpoint_format": "hf"} if make is make_trainer else {}
        changes = {"model": lambda: copy.deepcopy(model), **saving, **more}
        train(build(make, tmp_path / folder, case | changes))
    for name in ("optimizer.pt", "scheduler.pt"):
        first, second = (
            torch.load(tmp_path / folder / "checkpoint-3" / name, weights_only=True)
            for folder in ("theirs", "ours")
        )
        assert ts.diff(first, second) == []
