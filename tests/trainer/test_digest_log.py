"""``log_digest_steps``: what is logged, that a resumed run's log is the same, that it is free when off."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.shell import At, Killed, Scored, kill, logged, make_trainer, scored
from trainer import checkpoint, digest_log


def test_a_line_for_the_beginning_and_for_every_kth_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, log_digest_steps=2, save_strategy="steps", save_steps=2)
    before = ts.digest(trainer.train_state)
    trainer.train()
    lines = digest_log.read(tmp_path / "digests.jsonl")

    assert list(lines) == [0, 2, 4]
    assert lines[0]["digest"] == before
    assert lines[0]["loss"] is None
    for step in (2, 4):
        state = checkpoint.load(tmp_path / f"checkpoint-{step}").state
        assert lines[step]["digest"] == ts.digest(state)
        assert lines[step]["loss"] == logged(trainer, "loss")[step - 1]
        assert lines[step]["epoch"] == step / 5
    assert set(lines[4]["parts"]) == {"params", "opt_state", "step", "key"}


def test_parts_tell_what_has_changed(tmp_path: Path) -> None:
    make_trainer(tmp_path, log_digest_steps=1).train()
    lines = digest_log.read(tmp_path / "digests.jsonl")
    for name, changes in {"key": False, "step": True, "params": True, "opt_state": True}.items():
        assert (lines[1]["parts"][name] != lines[2]["parts"][name]) is changes


class Replacing(Scored):
    """Counts its calls in a buffer that it replaces instead of changing it in place."""

    count: Tensor

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.count = self.count + 1
        return super().forward(x, labels)


def test_buffers_count_as_the_module_has_them(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, scored(kind=Replacing), log_digest_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    lines = digest_log.read(tmp_path / "digests.jsonl")
    for step in range(1, 6):
        state = checkpoint.load(tmp_path / f"checkpoint-{step}").state
        assert state is not None
        assert state.buffers["count"] == step
        assert lines[step]["digest"] == ts.digest(state)


def test_off_nothing_is_computed_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a digest was computed")

    monkeypatch.setattr(digest_log, "leaves", refuse)
    make_trainer(tmp_path).train()
    assert not (tmp_path / "digests.jsonl").exists()


def resumable(folder: Path, **changes: Any) -> Any:
    return make_trainer(folder, log_digest_steps=1, save_strategy="steps", save_steps=2, **changes)


def test_the_log_of_a_killed_and_resumed_run_is_that_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    resumable(tmp_path / "whole").train()
    with pytest.raises(Killed):
        resumable(tmp_path / "killed", callbacks=[At("step_begin", 3, kill)]).train()
    log = tmp_path / "killed" / "digests.jsonl"
    assert list(digest_log.read(log)) == [0, 1, 2, 3]
    with open(log, "a") as file:
        file.write('{"step": 4, "dig')  # a line that was cut off
    assert list(digest_log.read(log)) == [0, 1, 2, 3]

    resumable(tmp_path / "killed").train(resume_from_checkpoint=True)
    assert log.read_bytes() == (tmp_path / "whole" / "digests.jsonl").read_bytes()


def test_a_run_that_logs_nothing_drops_what_is_not_its_past(tmp_path: Path) -> None:
    resumable(tmp_path).train()
    log = tmp_path / "digests.jsonl"
    off = {"save_strategy": "no"}
    make_trainer(tmp_path, **off).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(digest_log.read(log)) == [0, 1, 2, 3, 4]
    make_trainer(tmp_path, **off).train()
    assert digest_log.read(log) == {}


def test_training_anew_starts_a_new_log(tmp_path: Path) -> None:
    resumable(tmp_path).train()
    first = (tmp_path / "digests.jsonl").read_bytes()
    resumable(tmp_path, seed=1).train()
    again = (tmp_path / "digests.jsonl").read_bytes()
    assert again.count(b"\n") == first.count(b"\n") == 6
    assert again != first


def test_changing_the_interval_is_no_change_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumable(tmp_path).train()
    caplog.clear()
    make_trainer(tmp_path, log_digest_steps=3, save_strategy="steps", save_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert "differ from those of the checkpoint" not in caplog.text


def test_truncating_leaves_the_old_lines_or_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "digests.jsonl"
    text = "".join(json.dumps({"step": s, "digest": "00"}) + "\n" for s in range(4))
    log.write_text(text)

    def fail(*arguments: Any) -> None:
        raise OSError("cut off here")

    for name in ("create", "write", "sync_open", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(digest_log.io, name, fail)
            with pytest.raises(OSError, match="cut off here"):
                digest_log.truncate(log, 1)
        assert log.read_text() == text
    assert list(digest_log.truncate(log, 1)) == [0, 1]  # the rest of an attempt is no hindrance
    assert list(digest_log.read(log)) == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["digests.jsonl"]


def test_a_full_disk_ends_the_log_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, log_digest_steps=1)

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digest_log, "open", full, raising=False)
    with caplog.at_level(logging.WARNING, "trainer"):
        assert trainer.train().global_step == 5
    assert "no digests are logged from step 0 on: [Errno 28] No space left" in caplog.text
    assert caplog.text.count("no digests are logged") == 1


def test_a_file_that_is_no_log_is_named_with_its_line(tmp_path: Path) -> None:
    log = tmp_path / "digests.jsonl"
    log.write_text('{"step": 1, "digest": "00"}\n{"step": "two"}\n')
    with pytest.raises(ValueError, match=r"digests.jsonl, line 2: not an entry of a log"):
        digest_log.read(log)


def test_the_digest_of_a_state_is_made_of_those_of_its_leaves(tmp_path: Path) -> None:
    state = make_trainer(tmp_path).train_state
    assert digest_log.combine(ts.leaf_digests(state)) == ts.digest(state)
