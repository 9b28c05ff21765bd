"""Going on from a checkpoint gives the bits, the records and the loss of a run that was not stopped."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainstep as ts
from support.shell import (
    At,
    Killed,
    Scored,
    Stream,
    Watching,
    kill,
    logged,
    make_trainer,
    outcome,
    samples,
    scored,
    scripted,
    stop,
)
from trainer import EarlyStoppingCallback, checkpoint


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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


@pytest.mark.row(85, 185)
@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "dropout") for name in SETTINGS),
        ("accumulating", "batch_norm"),
        ("plain", "counting"),
    ],
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


@pytest.mark.row(84)
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
        trainer = make_trainer(tmp_path / "run", callbacks=[At(event, at, kill)], **settings)
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


@pytest.mark.row(186)
def test_speeds_are_those_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(
        At("step_end", 5, lambda control: setattr(trainer._meter, "started", 100.0))
    )
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


@pytest.mark.row(85, 95)
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


@pytest.mark.row(195)
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


# ---- callbacks


@pytest.mark.row(89)
def test_callbacks_take_up_their_state_if_asked(tmp_path: Path) -> None:
    scores = [0.5, 0.6, 0.55, 0.54, 0.53]

    def build(values: list[float], **changes: Any) -> Any:
        return make_trainer(
            tmp_path,
            callbacks=[EarlyStoppingCallback(2)],
            more={"compute_metrics": scripted(values)},
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
