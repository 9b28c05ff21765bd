"""What is shown on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from trainer.callbacks.progress import display_record


class Bar:
    """Records what is done to it."""

    def __init__(self, total: int | None, initial: int, leave: bool) -> None:
        self.total, self.done, self.leave = total, initial, leave
        self.closed = False
        self.lines: list[str] = []

    def update(self, count: int) -> None:
        self.done += count

    def write(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


class Recording(ProgressCallback):
    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.bars: list[Bar] = []

    def make_bar(self, total: int | None, initial: int = 0, leave: bool = True) -> Bar:
        self.bars.append(Bar(total, initial, leave))
        return self.bars[-1]


class Unsized:
    def __len__(self) -> int:
        raise TypeError("no length")


def test_records_are_made_readable() -> None:
    record = {
        "loss": 0.123456,
        "grad_norm": np.float32(2.0),
        "total_flos": 1e9,
        "step": 3,
        "text": "x" * 11,
        "short": "x" * 10,
    }
    assert display_record(record, max_str_len=10) == {
        "loss": "0.1235",
        "grad_norm": "2",
        "step": 3,
        "text": "[text of 11 characters, more than max_str_len=10; raise max_str_len to see it]",
        "short": "x" * 10,
    }
    assert record["total_flos"] == 1e9


@pytest.mark.row(105)
def test_bars_of_a_training(make_args: Any, run_loop: Any) -> None:
    progress = Recording()
    handler = CallbackHandler([DefaultFlowCallback, progress], None, None, None, None)
    handler.eval_dataloader = [None] * 2
    args = make_args(logging_steps=2, eval_strategy="steps", eval_steps=2)
    run_loop(
        *(handler, args, TrainerState(), TrainerControl()),
        batches=5,
        window=2,
        epochs=1,
    )
    training, first, second = progress.bars
    assert (training.total, training.done, training.closed) == (3, 3, True)
    assert [(bar.total, bar.done, bar.leave, bar.closed) for bar in (first, second)] == [
        (2, 2, False, True)
    ] * 2
    assert training.lines[0] == "{'loss': '0.5', 'epoch': '0.8'}"
    assert training.lines[1] == "{'eval_loss': '1', 'epoch': '0.8'}"
    assert progress.training_bar is None


def test_a_resumed_training_starts_where_it_was() -> None:
    progress = Recording()
    state = TrainerState(global_step=4, max_steps=6)
    progress.on_train_begin(None, state, TrainerControl())
    assert (progress.bars[0].total, progress.bars[0].done) == (6, 4)
    state.global_step = 5
    progress.on_step_end(None, state, TrainerControl())
    assert progress.bars[0].done == 5


def test_starting_again_closes_the_bars_that_are_open() -> None:
    progress = Recording()
    state = TrainerState(max_steps=6)
    progress.on_train_begin(None, state, TrainerControl())
    progress.on_prediction_step(None, state, TrainerControl(), eval_dataloader=[1])
    progress.on_train_begin(None, state, TrainerControl())
    assert [bar.closed for bar in progress.bars] == [True, True, False]


@pytest.mark.parametrize("end", ["on_evaluate", "on_predict"])
def test_evaluation_alone_has_a_bar_that_stays(end: str) -> None:
    progress = Recording()
    progress.on_prediction_step(None, TrainerState(), TrainerControl(), eval_dataloader=Unsized())
    getattr(progress, end)(None, TrainerState(), TrainerControl())
    (bar,) = progress.bars
    assert (bar.total, bar.done, bar.leave, bar.closed) == (None, 1, True, True)


def test_other_processes_and_logs_without_training_show_nothing() -> None:
    progress = Recording()
    state = TrainerState(is_world_process_zero=False)
    for event in ("train_begin", "step_end", "prediction_step", "evaluate", "log", "train_end"):
        getattr(progress, f"on_{event}")(None, state, TrainerControl())
    progress.on_log(None, TrainerState(), TrainerControl(), logs={"loss": 1.0})
    progress.on_step_end(None, TrainerState(global_step=1), TrainerControl())
    assert progress.bars == []


def test_tqdm_draws_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressCallback()
    state = TrainerState(max_steps=2)
    progress.on_train_begin(None, state, TrainerControl())
    for step in (1, 2):
        state.global_step = step
        progress.on_step_end(None, state, TrainerControl())
    progress.on_log(None, state, TrainerControl(), logs={"loss": 0.5, "total_flos": 3.0})
    progress.on_train_end(None, state, TrainerControl())
    shown = capsys.readouterr()
    assert shown.out == "{'loss': '0.5'}\n"
    assert "2/2" in shown.err


@pytest.mark.row(105, 201)
def test_the_printer_prints_and_leaves_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"loss": 0.123456, "total_flos": 3.0}
    PrinterCallback().on_log(None, TrainerState(), TrainerControl(), logs=record)
    assert record == {"loss": 0.123456, "total_flos": 3.0}
    other = TrainerState(is_local_process_zero=False)
    PrinterCallback().on_log(None, other, TrainerControl(), logs=record)
    assert capsys.readouterr().out == "{'loss': '0.1235'}\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_in_a_file_records_have_lines_of_their_own(
    terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, state, control = ProgressCallback(), TrainerState(max_steps=3), TrainerControl()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    progress.on_train_begin(None, state, control)
    for step in (1, 2):
        state.global_step = step
        progress.on_step_end(None, state, control)
        progress.on_log(None, state, control, logs={"step": step})
    progress.on_train_end(None, state, control)

    shown = capfd.readouterr()
    assert shown.out.splitlines() == ["{'step': 1}", "{'step': 2}"]
    # The bar ends its line when it is closed, and in a file before the first record as well.
    assert shown.err.count("\n") == (1 if terminal else 2)
    assert progress.training_bar is None


def test_a_stream_without_isatty_is_written_to_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logger:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    stream, state, control = Logger(), TrainerState(max_steps=3), TrainerControl()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    progress = ProgressCallback()
    progress.on_train_begin(None, state, control)
    progress.on_log(None, state, control, logs={"loss": 1.0})
    progress.on_train_end(None, state, control)
    assert "{'loss': '1'}" in stream.text
