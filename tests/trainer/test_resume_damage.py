"""Which checkpoint is taken, which is passed over, and which is refused."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support import models
from support.shell import (
    Recorder,
    Scored,
    Watching,
    logged,
    make_trainer,
    outcome,
    scored,
)
from trainer import CheckpointError, Trainer, TrainerCallback
from trainer.checkpoint import verify


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_finished_training_does_nothing_more(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, save_strategy="epoch")
    expected = outcome(whole, whole.train())
    recorder = Recorder()
    trainer = make_trainer(tmp_path, scored(seed=1), save_strategy="epoch", callbacks=[recorder])
    result = trainer.train(resume_from_checkpoint=True)

    assert outcome(trainer, result) == expected
    assert recorder.events == ["init_end", "train_begin", ("log", "final"), "train_end"]


@pytest.mark.parametrize("resume", [None, False])
def test_training_begins_anew_if_it_is_not_told_to_resume(resume: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "epoch"}
    first, second = (make_trainer(tmp_path, **settings) for _ in range(2))
    first.train()
    second.train(resume_from_checkpoint=resume)

    assert len(second.state.log_history) == 6
    assert ts.digest(second.train_state) == ts.digest(first.train_state)


@pytest.mark.row(84)
def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no complete checkpoint in .*\nCall train\(\) without it to start anew"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    nowhere = tmp_path / "nowhere"
    for kind in (CheckpointError, ValueError):  # the latter is what Hugging Face's raises
        with pytest.raises(kind, match="nowhere: there is no such folder, and none in output_dir"):
            make_trainer(tmp_path).train(resume_from_checkpoint=str(nowhere))
    for step in range(1, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    listed = r"there are checkpoint-3, checkpoint-4, .*, checkpoint-10, and 2 older ones: give"
    with pytest.raises(CheckpointError, match=f"nowhere: there is no such folder. In .* {listed}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(nowhere))
    nowhere.mkdir()
    (nowhere / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="nowhere: there is no checkpoint in this folder"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(nowhere))
    with pytest.raises(CheckpointError, match=f"this folder. In {tmp_path} there are checkpoint-3"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path))


def truncate(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "train_state.json").unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE = {
    truncate: r"optimizer\.safetensors: it has \d+ bytes, expected \d+",
    flip: r"model\.safetensors: its SHA-256 is [0-9a-f]+, expected",
    lose: r"train_state\.json: missing",
    empty: r"manifest\.json: missing; the save was cut off",
}


@pytest.mark.row(190)
@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    harm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **settings)
    expected = outcome(whole, whole.train())
    harm(tmp_path / "checkpoint-5")
    harm(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=DAMAGE[harm]):
        make_trainer(tmp_path, **settings).train(str(tmp_path / "checkpoint-4"))

    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], **settings)
    with caplog.at_level(logging.INFO, logger="trainer"):
        result = trainer.train(resume_from_checkpoint=True)
    skipped = [r.getMessage() for r in caplog.records if "is passed over" in r.getMessage()]
    assert len(skipped) == 2
    for step, message in zip((5, 4), skipped, strict=True):
        assert f"checkpoint-{step} is passed over: " in message
        assert re.search(DAMAGE[harm], message)
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert outcome(trainer, result) == expected
    assert recorder.events[1:4] == ["train_begin", "epoch_begin", "step_begin"]


class Described(Trainer):
    """Saves what the libraries do beside weights."""

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        for name in ("config.json", "tokenizer.json", "README.md", "own.json"):
            (Path(str(output_dir)) / name).write_text("{}")


class Editing(TrainerCallback):
    """Changes a file of every checkpoint when it has been saved."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.name
        path.write_text('{"edited": true}')


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("wanted", [True, "path"])
def test_descriptions_of_the_model_may_be_edited(
    wanted: Any, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "make": Described}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    whole = make_trainer(tmp_path, callbacks=[Editing(name)], max_steps=6, **settings)
    expected = outcome(whole, whole.train())
    assert "keeping the last" not in caplog.text
    for step in (6, 3):
        [problem] = verify(tmp_path / f"checkpoint-{step}")
        assert problem.startswith(f"{name}: ")
        assert problem.endswith("; it only describes the model, so training can go on")
    shutil.rmtree(tmp_path / "checkpoint-6")

    again = make_trainer(tmp_path, max_steps=6, **settings)
    result = again.train(True if wanted is True else str(tmp_path / "checkpoint-3"))
    assert outcome(again, result) == expected
    assert f"checkpoint-3 has changed since it was saved: {name}: " in caplog.text


def test_other_files_may_not_be_edited(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "epoch", "make": Described}
    make_trainer(tmp_path, callbacks=[Editing("own.json")], **settings).train()
    with pytest.raises(CheckpointError, match=r"own\.json: it has 16 bytes, expected 2"):
        make_trainer(tmp_path, **settings).train(str(tmp_path / "checkpoint-5"))


def test_if_all_are_damaged_all_are_named(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    flip(tmp_path / "checkpoint-3")
    lose(tmp_path / "checkpoint-5")
    with pytest.raises(
        ValueError,
        match=r"no complete checkpoint in .*\n  checkpoint-5: train_state\.json: missing"
        r"(?s:.*)\n  checkpoint-3: model\.safetensors: its SHA",
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_trainer(tmp_path, scored("mlp"), save_strategy="epoch").train()

    with pytest.raises(ValueError, match="does not fit this model") as raised:
        make_trainer(tmp_path / "b", scored("batch_norm")).train(str(tmp_path / "checkpoint-5"))
    assert "missing: params/body.1.weight" in str(raised.value)
    assert "missing: buffers/body.1.running_mean" in str(raised.value)

    wide = Scored(torch.nn.Linear(models.IN, 3))
    with pytest.raises(ValueError) as raised:
        make_trainer(tmp_path / "c", wide).train(str(tmp_path / "checkpoint-5"))
    assert "unexpected: params/body.0.weight" in str(raised.value)

    renamed = Scored(models.build("mlp"))
    renamed.body[0] = torch.nn.Linear(models.IN, models.HIDDEN + 1)
    with pytest.raises(ValueError) as raised:
        make_trainer(tmp_path / "d", renamed).train(str(tmp_path / "checkpoint-5"))
    assert "params/body.0.weight is torch.float32 (6, 4), expected torch.float32 (7, 4)" in (
        str(raised.value)
    )


@pytest.mark.row(189)
def test_weights_alone_resume_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {
        "optim": "sgd",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_only_model": True,
    }
    whole = make_trainer(tmp_path, scored("dropout", Watching), **settings)
    whole.train()
    trainer = make_trainer(tmp_path, scored("dropout", Watching, seed=1), **settings)
    trainer.train(str(tmp_path / "checkpoint-2"))

    assert (
        "was saved with save_only_model: the weights are restored, optimizer moments are not"
        in (caplog.text)
    )
    # Without momentum there are no moments to lose: rate, order and dropout go on as they were.
    assert trainer.model.seen == whole.model.seen[2:]
    assert logged(trainer, "learning_rate") == logged(whole, "learning_rate")
    assert logged(trainer, "loss") == logged(whole, "loss")
