"""Going on from a checkpoint with other arguments."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

import trainstep as ts
from support.shell import (
    Recorder,
    Watching,
    flat,
    logged,
    make_trainer,
    samples,
    scored,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.row(187)
def test_new_intervals_take_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps"}
    make_trainer(tmp_path, save_steps=4, logging_steps=1, **settings).train()
    trainer = make_trainer(
        tmp_path,
        save_steps=5,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=7,
        learning_rate=0.01,
        **settings,
    )
    trainer.train(str(tmp_path / "checkpoint-4"))

    train = [r["step"] for r in trainer.state.log_history if "loss" in r]
    assert train == [1, 2, 3, 4, 6, 9]
    assert [r["step"] for r in trainer.state.log_history if "eval_loss" in r] == [7, 10]
    assert trainer.state.logging_steps == 3
    assert "Arguments differ from those of the checkpoint; those given now are used" in caplog.text
    assert "logging_steps: 3 (from args) != 1 (from checkpoint-4)" in caplog.text
    assert "learning_rate: 0.01 (from args) != 0.05" in caplog.text
    assert "output_dir" not in caplog.text
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(0.01 * 2 / 10)


def test_equal_arguments_and_other_reports_are_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.4}
    make_trainer(tmp_path, peak_tflops=1.0, **settings).train()
    reporting = {"disable_tqdm": False, "log_figures": True}
    make_trainer(tmp_path, **reporting, **settings).train(str(tmp_path / "checkpoint-2"))

    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_training_can_be_made_longer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", num_train_epochs=3, **settings)
    whole.train()
    make_trainer(tmp_path / "run", num_train_epochs=1, **settings).train()
    trainer = make_trainer(tmp_path / "run", num_train_epochs=3, **settings)
    trainer.train(resume_from_checkpoint=True)

    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)
    assert logged(trainer, "loss") == logged(whole, "loss")


def consumed(size: int, step: int, folder: Path, epochs: int = 2) -> list[float]:
    """Resume with batches of ``size``; return the first numbers of the samples seen after that."""
    model = scored("mlp", Watching)
    trainer = make_trainer(
        folder / "again", model, per_device_train_batch_size=size, num_train_epochs=epochs
    )
    trainer.train(str(folder / f"checkpoint-{step}"))
    assert trainer.state.train_batch_size == size
    return flat(model.seen)


@pytest.mark.row(188)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_another_batch_size_goes_on_after_the_same_samples(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved after 6 samples of the first epoch, in batches of 2."""
    whole = scored("mlp", Watching)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    make_trainer(tmp_path, whole, **settings).train()

    seen = consumed(size, 3, tmp_path, epochs=6)
    assert seen[:14] == flat(whole.seen)[6:20]
    updates = {1: 60, 3: 24, 6: 12}[size]
    assert (
        f"Batches hold {size} samples instead of 2: num_train_epochs=6 now stands for {updates} updates "
        "in all, 3 of which are made"
    ) in caplog.text


@pytest.mark.row(188)
def test_a_batch_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, scored("mlp"), save_strategy="steps", save_steps=3).train()

    with pytest.raises(
        ValueError,
        match=r"after 6 samples of epoch 0, in batches of 2; a batch of 4 does not divide that.*"
        "ignore_data_skip=True",
    ):
        consumed(4, 3, tmp_path)


def test_another_batch_size_at_the_end_of_an_epoch_that_had_a_short_batch(tmp_path: Path) -> None:
    """10 samples in batches of 4: the third batch holds 2, so 3 batches are not 12 samples."""
    whole = scored("mlp", Watching)
    make_trainer(
        tmp_path,
        whole,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=3,
        num_train_epochs=2,
    ).train()

    assert consumed(2, 3, tmp_path) == flat(whole.seen)[10:]


@pytest.mark.row(86)
def test_the_epoch_can_be_begun_again(tmp_path: Path) -> None:
    """12 samples, 6 batches an epoch; from step 8, epoch 1 starts at batch 0."""
    settings: dict[str, Any] = {"train": samples(12), "num_train_epochs": 3}
    model = scored("mlp", Watching)
    make_trainer(tmp_path, model, save_strategy="steps", save_steps=8, **settings).train()
    again, recorder = scored("mlp", Watching), Recorder()
    trainer = make_trainer(
        tmp_path / "again", again, callbacks=[recorder], ignore_data_skip=True, **settings
    )
    trainer.train(str(tmp_path / "checkpoint-8"))

    assert trainer.state.global_step == 18
    assert again.seen == model.seen[6:16]
    ends = [event[2] for event in recorder.events if event[0] == "step_end"]
    assert ends == pytest.approx([1 + i / 6 for i in range(1, 11)], abs=1e-6)


def test_a_finished_run_that_begins_its_epoch_again_only_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "ignore_data_skip": True}
    make_trainer(tmp_path, **settings).train()
    recorder = Recorder()
    make_trainer(tmp_path, callbacks=[recorder], **settings).train(resume_from_checkpoint=True)

    assert recorder.events[1:] == [
        *("train_begin", "epoch_begin", "epoch_end"),
        *(("log", "final"), "train_end"),
    ]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
