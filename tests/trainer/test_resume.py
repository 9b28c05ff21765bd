"""Going on from a checkpoint gives the bits, the records and the loss of a run that was not stopped."""

import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import models
from support.shell import (
    At,
    Killed,
    Recorder,
    Scored,
    Stream,
    Watching,
    kill,
    logged,
    make_trainer,
    samples,
    scored,
    stop,
    timeless,
)

import trainstep as ts
from trainer import CheckpointError, EarlyStoppingCallback, Trainer, checkpoint


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def outcome(trainer: Trainer, result: Any) -> tuple[Any, ...]:
    """Return all that must be equal: state, records, mean loss, steps."""
    return (
        ts.digest(trainer.train_state),
        timeless(trainer.state.log_history),
        result.training_loss,
        result.global_step,
        trainer.state.epoch,
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"gradient_accumulation_steps": 2},
    "sparse records": {"logging_steps": 3, "gradient_accumulation_steps": 2},
    "evaluating": {"eval_strategy": "steps", "eval_steps": 2},
    "by epoch": {"logging_strategy": "epoch", "eval_strategy": "epoch"},
    "cut short": {"max_steps": 6, "logging_strategy": "epoch", "eval_strategy": "epoch"},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1},
    "data seed": {"data_seed": 7, "dataloader_drop_last": True, "per_device_train_batch_size": 4},
    "skipping": {"on_nonfinite": "skip"},
}


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "dropout") for name in SETTINGS), ("accumulating", "batch_norm"), ("plain", "counting")],
)
def test_every_checkpoint_leads_to_the_same_end(name: str, model: str, tmp_path: Path) -> None:
    """Saved at every step: in the middle of an epoch, at its end, in the first and the second."""
    settings = {"train": samples(8), "num_train_epochs": 2, **SETTINGS[name]}
    whole = make_trainer(
        tmp_path / "whole", scored(model), save_strategy="steps", save_steps=1, **settings
    )
    expected = outcome(whole, whole.train())

    points = checkpoint.list_checkpoints(tmp_path / "whole")
    assert len(points) == whole.state.max_steps >= 4
    for point in points:
        trainer = make_trainer(tmp_path / point.name, scored(model, seed=1), **settings)
        result = trainer.train(resume_from_checkpoint=str(point))
        assert outcome(trainer, result) == expected, point.name


@pytest.mark.parametrize("steps", [-1, 5])
def test_every_checkpoint_of_an_epoch_leads_to_the_same_end(steps: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 3,
        "max_steps": steps,
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    expected = outcome(whole, whole.train())

    for point in checkpoint.list_checkpoints(tmp_path / "whole"):
        trainer = make_trainer(tmp_path / point.name, scored(seed=1), **settings)
        assert outcome(trainer, trainer.train(str(point))) == expected, point.name


@pytest.mark.parametrize(
    ("event", "at"),
    [("step_begin", 3), ("pre_optimizer_step", 4), ("step_end", 5), ("log", 7), ("save", 4)],
)
def test_a_run_that_dies_goes_on_from_its_newest_checkpoint(
    event: str, at: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "train": samples(8),
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    expected = outcome(whole, whole.train())

    for resume in (None, True):  # dies twice at the same place, or at the next save
        trainer = make_trainer(
            tmp_path / "run", callbacks=[At(event, at, kill)], **settings
        )
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=resume)
        at += 2 if event == "save" else 0
    trainer = make_trainer(tmp_path / "run", scored(seed=9), **settings)
    assert outcome(trainer, trainer.train(resume_from_checkpoint=True)) == expected


def test_a_run_that_was_stopped_in_good_order_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "run", callbacks=[At("step_end", 2, stop)], **settings)
    assert stopped.train().global_step == 2
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=True)

    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)
    assert logged(trainer, "loss") == logged(whole, "loss")


def test_speeds_are_those_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(At("step_end", 5, lambda control: setattr(trainer._meter, "started", 100.0)))
    monkeypatch.setattr("trainer.metrics.time.time", lambda: 102.0)
    metrics = trainer.train(str(tmp_path / "checkpoint-4")).metrics

    assert metrics["train_steps_per_second"] == 0.5
    assert metrics["train_samples_per_second"] == 1.0


# ---- what user code draws


class Noisy(list):
    """Samples with noise from the three global generators."""

    deterministic = False

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        return {**row, "x": row["x"] + noise}


class Drawing(Scored):
    """Draws from Python's and NumPy's generators in its forward pass."""

    def forward(self, x: Any, labels: Any = None) -> Any:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        return super().forward(x * noise, labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_data_and_models_go_on_alike(workers: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": Noisy(samples()),
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 2,
        "dataloader_num_workers": workers,
    }
    whole = make_trainer(tmp_path / "whole", scored("dropout", Drawing), **settings)
    expected = outcome(whole, whole.train())

    for step in (3, 6, 9):
        trainer = make_trainer(tmp_path / "again", scored("dropout", Drawing, seed=1), **settings)
        random.seed(step)
        result = trainer.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert outcome(trainer, result) == expected, step


def test_a_stream_goes_on_in_its_second_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stream() -> Any:
        return Stream(samples(6))

    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(
        tmp_path / "whole", scored("dropout", Watching), train=stream(), **settings
    )
    expected = outcome(whole, whole.train())

    for step in (2, 3, 4):
        trainer = make_trainer(
            tmp_path / "again", scored("dropout", Watching), train=stream(), **settings
        )
        result = trainer.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert outcome(trainer, result) == expected
        assert trainer.model.seen == whole.model.seen[step:]
    assert "cannot seek: 1 batches are read again and dropped" in caplog.text


# ---- changed arguments


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


def test_equal_arguments_are_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.4}
    make_trainer(tmp_path, **settings).train()
    make_trainer(tmp_path, disable_tqdm=False, **settings).train(str(tmp_path / "checkpoint-2"))

    assert not caplog.records


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
    return sum(model.seen, [])


@pytest.mark.parametrize("size", [1, 3, 6])
def test_another_batch_size_goes_on_after_the_same_samples(size: int, tmp_path: Path) -> None:
    """Saved after 6 samples of the first epoch, in batches of 2."""
    whole = scored("mlp", Watching)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    make_trainer(tmp_path, whole, **settings).train()

    seen = consumed(size, 3, tmp_path, epochs=6)
    assert seen[:14] == sum(whole.seen, [])[6:20]


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

    assert consumed(2, 3, tmp_path) == sum(whole.seen, [])[10:]


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


# ---- what is found, and what is not


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


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no complete checkpoint in .*\nCall train\(\) without it to start anew"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


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

    assert "was saved with save_only_model: the weights are restored, optimizer moments are not" in (
        caplog.text
    )
    # Without momentum there are no moments to lose: rate, order and dropout go on as they were.
    assert trainer.model.seen == whole.model.seen[2:]
    assert logged(trainer, "learning_rate") == logged(whole, "learning_rate")
    assert logged(trainer, "loss") == logged(whole, "loss")


# ---- callbacks


def test_callbacks_take_up_their_state_if_asked(tmp_path: Path) -> None:
    scores = [0.5, 0.6, 0.55, 0.54, 0.53]

    def build(values: list[float], **changes: Any) -> Any:
        rest = iter(values)
        return make_trainer(
            tmp_path,
            callbacks=[EarlyStoppingCallback(2)],
            more={"compute_metrics": lambda prediction: {"score": next(rest)}},
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            metric_for_best_model="score",
            greater_is_better=True,
            load_best_model_at_end=True,
            **changes,
        )

    assert build(scores).train().global_step == 4
    point = str(tmp_path / "checkpoint-3")
    patient = build(scores[3:], restore_callback_states_from_checkpoint=True)
    assert patient.train(point).global_step == 4
    assert patient.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert build(scores[3:]).train(point).global_step == 5


def test_the_state_of_a_checkpoint_is_json_that_anybody_can_read(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="epoch", logging_steps=2).train()

    text = json.loads((tmp_path / "checkpoint-5" / "train_state.json").read_text())
    position = text["position"]
    assert (position["epoch"], position["batch"], position["batch_size"]) == (1, 0, 2)
    assert text["state"]["step"] == 5
    assert position["meter"]["count"] == 1
