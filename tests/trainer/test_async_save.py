"""Checkpoints written in the background: the same bytes, failures noticed, nothing lost."""

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import trainstep as ts
from support.shell import make_trainer, scored
from trainer import CheckpointError, Trainer, checkpoint


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.last(self.second(self.first(x).relu()))


def run(folder: Path, **changes: Any) -> Trainer:
    trainer = make_trainer(
        folder,
        scored(Tied),
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        **changes,
    )
    trainer.train()
    return trainer


def test_background_saves_have_the_bytes_of_direct_ones(tmp_path: Path) -> None:
    direct, background = run(tmp_path / "a"), run(tmp_path / "b", async_save=True)
    assert ts.digest(direct.train_state) == ts.digest(background.train_state)
    for step in (4, 6):
        here, there = (tmp_path / n / f"checkpoint-{step}" for n in "ab")
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "b")] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    again = run_again(tmp_path / "b", 4)
    assert ts.digest(again.train_state) == ts.digest(direct.train_state)


def run_again(folder: Path, step: int) -> Trainer:
    trainer = make_trainer(folder, scored(Tied), max_steps=6, async_save=True)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer


def test_a_failed_background_save_is_warned_of_and_the_last_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.checkpoint import background

    real, bad = background.save, {2}

    def failing(root: Any, step: int, contents: Any) -> Path:
        if step in bad:
            raise CheckpointError(f"disk full at {step}")
        return real(root, step, contents)

    monkeypatch.setattr(background, "save", failing)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, async_save=True)
    assert "was not saved, training goes on: disk full at 2" in caplog.text
    bad.add(6)
    with pytest.raises(CheckpointError, match="disk full at 6"):
        run(tmp_path, async_save=True)


def test_an_overridden_save_model_is_called_directly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Trainer):
        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)

    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, make=Own, max_steps=1, async_save=True).train()
    assert "async_save is off: Own overrides save_model" in caplog.text
