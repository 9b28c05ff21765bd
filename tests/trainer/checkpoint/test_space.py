"""Space is asked for before anything is written; a save that cannot be made leaves all as it was."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from support.shell import logged, make_trainer
from trainer import CheckpointError, checkpoint
from trainer.checkpoint import io, space


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_an_estimate_is_bytes_headers_and_some_to_spare() -> None:
    tensors = [torch.zeros(1000), torch.zeros(3, dtype=torch.int64)]
    assert space.estimate(tensors, [b"12345"]) == 4000 + 24 + 5 + 2 * 1024 + 65536


@pytest.mark.parametrize("hf", [False, True])
def test_a_checkpoint_takes_no_more_than_was_estimated(
    hf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(space, "check", lambda root, count: needed.append(count))
    make_trainer(tmp_path, save_strategy="epoch", checkpoint_format="hf" if hf else "safe").train()
    files = [path for path in (tmp_path / "checkpoint-5").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= needed[0]


def test_too_little_space_is_noticed_before_writing(tmp_path, make, monkeypatch, disk):
    monkeypatch.setattr(io, "free_bytes", lambda folder: 1000)
    disk.arm(None)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, 3, make.contents(make.state()))
    assert "saving needs about " in str(caught.value)
    assert "KiB), 1000 are free (1000.0 B); nothing was written and nothing deleted. Free some" in (
        str(caught.value)
    )
    assert disk.log == []
    assert list(tmp_path.iterdir()) == []


def test_the_space_of_a_model_without_state_counts(tmp_path, make, monkeypatch):
    monkeypatch.setattr(io, "free_bytes", lambda folder: 300_000)
    contents = make.contents(None, model_tensors={"w": torch.zeros(100_000)})
    with pytest.raises(CheckpointError, match=r"needs about 46\d{4} bytes \(45\d\.\d KiB\)"):
        checkpoint.save(tmp_path, 3, contents)


def test_enough_space_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "free_bytes", lambda folder: 1000)
    space.check(tmp_path, 1000)
    with pytest.raises(CheckpointError, match="1001 bytes"):
        space.check(tmp_path, 1001)


@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_without_a_checkpoint_and_old_ones_stay(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    answers = iter([10**12, 10**12, 5, 5, 10**12])  # at the steps 1 to 5
    monkeypatch.setattr(io, "free_bytes", lambda folder: next(answers))
    trainer = make_trainer(
        tmp_path / "full",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        async_save=background,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()

    assert {path.name for path in (tmp_path / "full").iterdir()} == {"checkpoint-2", "checkpoint-5"}
    assert caplog.text.count("5 are free (5.0 B); nothing was written and nothing deleted") == 2
    assert caplog.text.count("training goes on") == 2
    assert logged(trainer, "loss") == logged(plain, "loss")


@pytest.mark.parametrize("background", [False, True])
def test_the_last_save_needs_space(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "free_bytes", lambda folder: 5)
    trainer = make_trainer(tmp_path, save_strategy="steps", async_save=background)
    with pytest.raises(CheckpointError, match="5 are free"):
        trainer.train()
    assert trainer.train_state.step == 5
    assert list(tmp_path.iterdir()) == []


def test_space_that_ran_out_while_writing_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The estimate was right, but somebody else filled the disk."""
    write = io.write

    def full(file: Any, data: Any) -> None:
        if "checkpoint-2-" in file.name and len(data) > 100:
            write(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(io, "write", full)
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5"}
    assert "Checkpoint at step 2 was not saved, training goes on" in caplog.text


def test_a_folder_that_became_read_only_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    make_folder = io.make_folder

    def refuse(path: Path) -> None:
        if "checkpoint-2" in path.name:
            raise OSError(30, "Read-only file system")
        make_folder(path)

    monkeypatch.setattr(io, "make_folder", refuse)
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    assert "Read-only file system. Make the folder writable or choose another output_dir" in (
        caplog.text
    )
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5"}
