"""Checkpoints as the trainer makes them: which, when, how many, the best one, and failures."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainstep as ts
from support.shell import At, Recorder, logged, make_trainer, samples, scored, scripted, weights
from trainer import CheckpointError, checkpoint
from trainer.checkpoint import io


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def saved(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder."""
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.row(79)
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 5]),
        ({"save_strategy": "steps", "save_steps": 0.5}, [3, 5]),
        ({"save_strategy": "steps", "save_steps": 0}, [5]),
        ({"save_strategy": "steps"}, [5]),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, [5, 10]),
        ({"save_strategy": "epoch", "max_steps": 3}, [3]),
        ({"save_strategy": "no"}, []),
    ],
)
def test_checkpoints_appear_when_they_should(
    changes: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    make_trainer(tmp_path, **changes).train()

    assert saved(tmp_path) == steps


@pytest.mark.row(81)
def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("batch_norm"), save_strategy="epoch")
    trainer.train()
    folder = tmp_path / "checkpoint-5"

    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "train_state.json", "trainer_state.json"),
        *("training_args.json", "host_rng-0.json", "manifest.json"),
    }
    assert checkpoint.verify(folder) == []
    stored = load_file(folder / "model.safetensors")
    for name, tensor in weights(trainer).items():
        assert torch.equal(stored[name], tensor), name
    found = checkpoint.load(folder)
    assert found.state is not None
    assert ts.digest(found.state) == ts.digest(trainer.train_state)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"], state["max_steps"]) == (5, 1.0, 5)
    assert len(state["log_history"]) == 5
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 0.05


def test_saving_does_not_change_training(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a")
    saving = make_trainer(tmp_path / "b", save_strategy="steps", save_steps=1)
    plain.train()
    saving.train()

    assert ts.digest(plain.train_state) == ts.digest(saving.train_state)


@pytest.mark.row(82)
def test_weights_alone_can_be_saved(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="epoch", save_only_model=True).train()

    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"host_rng-0.json"}
    found = checkpoint.load(tmp_path / "checkpoint-5")
    assert (found.state, found.host_rng) == (None, {})


# ---- limits, and the best one


def tracked(folder: Path, values: list[float], **changes: Any) -> Any:
    """A trainer that evaluates at every one of its 5 steps and keeps track of ``score``."""
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    return make_trainer(folder, more={"compute_metrics": scripted(values)}, **(settings | changes))


@pytest.mark.row(83)
def test_old_checkpoints_go(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()

    assert saved(tmp_path) == [4, 5]


@pytest.mark.row(83)
def test_the_best_and_the_newest_survive_the_limit(tmp_path: Path) -> None:
    trainer = tracked(tmp_path, [0.1, 0.9, 0.3, 0.2, 0.4], save_total_limit=2)
    trainer.train()

    assert saved(tmp_path) == [2, 5]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 2)


@pytest.mark.row(83)
def test_a_limit_of_one_leaves_the_best_at_the_end(tmp_path: Path) -> None:
    recorder: list[list[int]] = []
    trainer = tracked(tmp_path, [0.1, 0.9, 0.3, 0.2, 0.4], save_total_limit=1)
    for step in (1, 2, 3, 4, 5):
        trainer.add_callback(At("save", step, lambda control: recorder.append(saved(tmp_path))))
    trainer.train()

    assert recorder == [[1], [2], [2, 3], [2, 4], [2, 5]]
    assert saved(tmp_path) == [2]


@pytest.mark.row(87)
def test_the_best_weights_are_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = tracked(tmp_path, [0.1, 0.9, 0.3, 0.2, 0.4], load_best_model_at_end=True)
    before = next(trainer.model.parameters())
    trainer.train()

    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, best[name])
        assert torch.equal(tensor, trainer.train_state.params[name])
        assert not torch.equal(tensor, last[name])
    assert next(trainer.model.parameters()) is before


@pytest.mark.row(88)
@pytest.mark.parametrize(
    ("greater", "values", "best"),
    [(True, [1, 3, 3, 2, 1], 2), (False, [3, 1, 1, 2, 3], 2), (None, [1, 2, 3, 4, 4], 4)],
)
def test_only_better_is_best(
    greater: bool | None, values: list[float], best: int, tmp_path: Path
) -> None:
    trainer = tracked(tmp_path, values, greater_is_better=greater, save_strategy="no")
    trainer.train()

    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint is None


@pytest.mark.row(80)
def test_only_the_best_are_saved_if_that_is_the_strategy(tmp_path: Path) -> None:
    tracked(tmp_path, [0.2, 0.1, 0.3, 0.3, 0.4], save_strategy="best").train()

    assert saved(tmp_path) == [1, 3, 5]


def test_the_loss_of_one_dataset_of_several_can_decide(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        evaluation={"a": samples(3), "b": samples(3, seed=1)},
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=2,
        metric_for_best_model="eval_b_loss",
        load_best_model_at_end=True,
    )
    trainer.train()

    assert trainer.args.greater_is_better is False
    assert trainer.state.best_metric == min(logged(trainer, "eval_b_loss"))


@pytest.mark.row(199)
def test_a_best_step_between_two_saves_is_saved_too(tmp_path: Path) -> None:
    trainer = tracked(
        tmp_path, [0.1, 0.2, 0.9, 0.3, 0.2], save_steps=2, load_best_model_at_end=True
    )
    trainer.train()

    assert saved(tmp_path) == [1, 2, 3, 4, 5]
    best = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(trainer).items())


def damage(folder: Path) -> None:
    """Flip a byte in the middle of the weights."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["damaged", "gone", "never"])
def test_a_best_checkpoint_that_cannot_be_loaded_is_warned_of(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = tmp_path / "checkpoint-2"
    actions: dict[str, Any] = {"damaged": damage, "gone": shutil.rmtree}
    trainer = tracked(tmp_path, [0.1, 0.9, 0.3, 0.2, 0.4], load_best_model_at_end=True)
    if what == "never":
        trainer._save_checkpoint = lambda model, trial: None
    else:
        trainer.add_callback(At("step_end", 4, lambda control: actions[what](best)))
    trainer.train()

    expected = "no checkpoint holds the best model" if what == "never" else "is damaged"
    assert expected in caplog.text
    if what != "never":
        last = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
        assert all(torch.equal(tensor, last[name]) for name, tensor in weights(trainer).items())


# ---- failures


def failing(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Let the disk be full whenever the checkpoint of one of ``steps`` is written."""
    create = io.create

    def full(path: Path) -> Any:
        if any(f"checkpoint-{step}" in str(path) for step in steps):
            raise OSError(28, "No space left on device")
        return create(path)

    monkeypatch.setattr(io, "create", full)


def test_a_save_that_fails_is_warned_of_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    failing(monkeypatch, [2, 3])
    recorder = Recorder()
    trainer = tracked(
        tmp_path / "full",
        [0.1, 0.9, 0.3, 0.2, 0.4],
        load_best_model_at_end=True,
        save_total_limit=3,
    )
    trainer.add_callback(recorder)
    trainer.train()

    assert saved(tmp_path / "full") == [1, 4, 5]
    assert not [path for path in (tmp_path / "full").iterdir() if path.name.startswith(".")]
    for step in (2, 3):
        assert f"Checkpoint at step {step} was not saved, training goes on" in caplog.text
    assert "No space left on device" in caplog.text
    assert "Free some space or lower save_total_limit" in caplog.text
    assert recorder.events.count("save") == 3  # nothing is announced that is not there
    # The best step has no checkpoint: what is loaded is an earlier one, and that is said.
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "full" / "checkpoint-1")
    assert "step 2" in caplog.text
    assert logged(trainer, "loss") == logged(plain, "loss")


def test_the_last_save_must_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [5])
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(CheckpointError, match=r"checkpoint-5: it could not be written.*No space"):
        trainer.train()

    assert saved(tmp_path) == [2, 4]
    assert not trainer.is_in_train
    assert trainer.train_state.step == 5


def test_a_checkpoint_that_cannot_be_deleted_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = io.rename

    def stuck(source: Path, target: Path) -> None:
        if Path(target).name.startswith(".gone-"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(io, "rename", stuck)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()

    assert saved(tmp_path) == [2, 4, 5]
    assert "old checkpoints could not be deleted" in caplog.text


def test_with_several_evaluation_sets_the_best_metric_names_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    settings |= {"load_best_model_at_end": True, "evaluation": {"a": samples(3), "b": samples(2)}}
    advice = 'gave no eval_loss; .* name one of their metrics: "a_loss" or "b_loss"'
    with pytest.raises(KeyError, match=advice):
        make_trainer(tmp_path, **settings).train()
    make_trainer(tmp_path, metric_for_best_model="b_loss", **settings).train()
