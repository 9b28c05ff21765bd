"""Signals: one step, one save, a status of its own; and a resumed run that cannot be told apart."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import trainstep as ts
from support.processes import ROOT
from support.shell import At, Recorder, make_trainer, outcome, samples, scored, scripted, stop
from trainer import (
    CheckpointError,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    checkpoint,
    interrupt,
)
from trainer.checkpoint import io
from trainer.interrupt import TrainingInterrupted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Any:
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in watched]
    yield
    assert [signal.getsignal(number) for number in watched] == before


def send(number: signal.Signals = signal.SIGTERM) -> Callable[[Any], None]:
    """For ``At``: a signal comes."""
    return lambda control: os.kill(os.getpid(), number)


EVALUATING: dict[str, Any] = {
    "train": samples(8),
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}
BY_EPOCH: dict[str, Any] = {
    "train": samples(8),
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "gradient_accumulation_steps": 2,
}


def interrupted(folder: Path, where: Any, **settings: Any) -> TrainingInterrupted:
    """Train until the signal that the callback ``where`` sends; return what ``train`` raised."""
    trainer = make_trainer(folder, enable_jit_checkpoint=True, callbacks=[where], **settings)
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert caught.value.code == 75
    assert trainer.train_state.step == caught.value.step
    assert caught.value.checkpoint == folder / f"checkpoint-{caught.value.step}"
    assert checkpoint.verify(caught.value.checkpoint) == []
    names = {path.name for path in folder.iterdir()}
    assert all(name.startswith("checkpoint-") for name in names), names
    assert checkpoint.newest(folder) == (caught.value.checkpoint, [])
    return caught.value


class InEvaluation(TrainerCallback):
    """A signal comes at the ``at``-th batch of all evaluations, counted from 1."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.row(90)
@pytest.mark.parametrize("settings", [EVALUATING, BY_EPOCH], ids=["steps", "epoch"])
@pytest.mark.parametrize("event", ["step_begin", "pre_optimizer_step", "step_end", "save", "log"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_that_a_signal_ended_goes_on_as_if_it_had_not(
    event: str, at: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole", **settings)
    expected = outcome(whole, whole.train())
    sent: list[int] = []

    def act(control: Any) -> None:
        sent.append(trainer.train_state.step)
        send()(control)

    trainer = make_trainer(
        tmp_path / "run", enable_jit_checkpoint=True, callbacks=[At(event, at, act)], **settings
    )
    with suppress(TrainingInterrupted):
        trainer.train()
        assert not sent  # there is no such event at that step
    if sent:  # the step in progress is finished; what is begun at a step's end belongs to that step
        assert trainer.train_state.step == at + (event in ("step_begin", "pre_optimizer_step"))
    trainer = make_trainer(tmp_path / "run", scored(seed=9), enable_jit_checkpoint=True, **settings)
    assert outcome(trainer, trainer.train(resume_from_checkpoint=True)) == expected
    last = [checkpoint.list_checkpoints(tmp_path / name)[-1].name for name in ("run", "whole")]
    assert last[0] == last[1]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_evaluation_is_broken_off_and_made_up_for(batch: int, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", **EVALUATING)
    expected = outcome(whole, whole.train())
    error = interrupted(tmp_path / "run", InEvaluation(batch), **EVALUATING)
    found = checkpoint.load(error.checkpoint)
    assert found.manifest.step == (2 if batch < 3 else 4)  # two batches each
    assert found.position["unfinished"] == ["should_evaluate", "should_save"]
    trainer = make_trainer(tmp_path / "run", scored(seed=9), **EVALUATING)
    assert outcome(trainer, trainer.train(resume_from_checkpoint=True)) == expected


def test_a_run_interrupted_twice_at_the_same_evaluation_still_makes_up_for_it(
    tmp_path: Path,
) -> None:
    settings = EVALUATING | {"eval_on_start": True}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    interrupted(tmp_path / "run", InEvaluation(3), **settings)  # the first two were at the start
    for batch in (1, 3):  # in the evaluation at the start, and in that which is made up for
        trainer = make_trainer(
            tmp_path / "run",
            enable_jit_checkpoint=True,
            callbacks=[InEvaluation(batch)],
            **settings,
        )
        with pytest.raises(TrainingInterrupted):
            trainer.train(resume_from_checkpoint=True)
        assert checkpoint.load(tmp_path / "run" / "checkpoint-2").position["unfinished"]
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)
    steps = [r["step"] for r in trainer.state.log_history if "eval_loss" in r]
    assert steps[-4:] == [2, 4, 6, 8]


def test_the_folder_that_is_named_is_the_one_that_is_there(tmp_path: Path) -> None:
    class Elsewhere(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / "elsewhere")

    where = At("step_end", 2, send())
    trainer = make_trainer(tmp_path, make=Elsewhere, enable_jit_checkpoint=True, callbacks=[where])
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert caught.value.checkpoint == tmp_path / "elsewhere" / "checkpoint-2"
    assert checkpoint.verify(caught.value.checkpoint) == []


def test_before_the_first_step_there_is_a_checkpoint_as_well(tmp_path: Path) -> None:
    error = interrupted(tmp_path / "run", InEvaluation(1), eval_on_start=True, train=samples(8))
    assert error.step == 0
    whole = make_trainer(tmp_path / "whole", train=samples(8))
    whole.train()
    trainer = make_trainer(tmp_path / "run", scored(seed=9), train=samples(8))
    trainer.train(resume_from_checkpoint=True)
    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        enable_jit_checkpoint=True,
        save_strategy="steps",
        save_steps=2,
        callbacks=[recorder, At("save", 2, send())],
    )
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert recorder.events.count("save") == 1


def test_a_stop_that_was_asked_for_at_the_same_step_is_not_forgotten(tmp_path: Path) -> None:
    """The epoch is left early anyway: its end belongs to the step."""

    def both(control: Any) -> None:
        stop(control)
        send()(control)

    error = interrupted(tmp_path, At("step_end", 2, both), eval_strategy="epoch")
    assert checkpoint.load(error.checkpoint).position["unfinished"] == [
        "should_evaluate",
        "should_training_stop",
    ]
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert [r["step"] for r in trainer.state.log_history if "eval_loss" in r] == [2]


def test_early_stopping_counts_the_evaluation_that_is_made_up_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,
    }
    scores = [0.5, 0.4, 0.3, 0.2, 0.1]
    error = interrupted(
        tmp_path,
        InEvaluation(5),  # two batches each
        more={"compute_metrics": scripted(scores)},
        **settings,
    )
    assert error.step == 3
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(1)],
        more={"compute_metrics": scripted(scores[2:])},
        **settings,
    )
    assert trainer.train(resume_from_checkpoint=True).global_step == 3


def test_a_background_save_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, save = threading.Event(), checkpoint.background.save

    def slow(*arguments: Any) -> Any:
        entered.wait(0.3)
        return save(*arguments)

    monkeypatch.setattr(checkpoint.background, "save", slow)
    interrupted(tmp_path, At("step_end", 2, send()), async_save=True)


def test_a_save_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "free_bytes", lambda folder: 10)
    trainer = make_trainer(
        tmp_path, enable_jit_checkpoint=True, callbacks=[At("step_end", 2, send())]
    )
    with pytest.raises(CheckpointError, match="10 are free"):
        trainer.train()
    assert trainer.train_state.step == 2


def test_ctrl_c_asks_as_well(tmp_path: Path) -> None:
    error = interrupted(tmp_path, At("step_begin", 2, send(signal.SIGINT)))
    assert str(error) == (
        f"SIGINT: training was ended after step 3 and saved in {tmp_path / 'checkpoint-3'}; "
        "train(resume_from_checkpoint=True) goes on from there"
    )


def test_what_all_processes_agree_on_counts(tmp_path: Path) -> None:
    """On several processes the signal may come to another one, or has not come to all yet."""
    asked: list[bool] = []

    def agree(here: bool) -> bool:
        asked.append(here)
        return len(asked) > 4

    def other(control: Any) -> None:
        trainer._interruption.agree = agree

    trainer = make_trainer(
        tmp_path, enable_jit_checkpoint=True, callbacks=[At("step_begin", 1, other)]
    )
    with pytest.raises(TrainingInterrupted, match="a signal: training was ended after step 4"):
        trainer.train()
    assert asked == [False] * 5  # twice a step: before and after what is to be done at its end


def test_workers_that_the_signal_killed_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Killed(list):
        def __getitem__(self, index: Any) -> Any:
            if trainer.state.global_step == 2:
                trainer._interruption._ask(signal.SIGTERM, None)
                raise RuntimeError("DataLoader worker is killed")
            return super().__getitem__(index)

    trainer = make_trainer(tmp_path, train=Killed(samples(10)), enable_jit_checkpoint=True)
    with pytest.raises(TrainingInterrupted, match="after step 2"):
        trainer.train()
    assert "After SIGTERM, fetching data failed: DataLoader worker is killed" in caplog.text


def test_an_error_in_a_step_is_one_even_then(tmp_path: Path) -> None:
    def fail(control: Any) -> None:
        send()(control)
        raise RuntimeError("a bug")

    trainer = make_trainer(
        tmp_path, enable_jit_checkpoint=True, callbacks=[At("pre_optimizer_step", 2, fail)]
    )
    # The signal is not lost: it is sent again once its old handler is back.
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(RuntimeError, match="a bug"):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [signal.SIGTERM]


def test_outside_of_the_main_thread_there_are_no_signals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, enable_jit_checkpoint=True)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 5
    assert "enable_jit_checkpoint has no effect: train() was not called in the main" in caplog.text


# ---- without enable_jit_checkpoint


def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_a_usable_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, callbacks=[At("step_begin", 2, send(signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.train_state.step == 2
    short = make_trainer(tmp_path / "short", callbacks=[At("step_end", 2, stop)])
    short.train()
    assert ts.digest(trainer.train_state) == ts.digest(short.train_state)


def test_an_update_is_finished_before_the_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = interrupt.Whole.__enter__
    count = [0]

    def entered(self: Any) -> None:
        enter(self)
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(interrupt.Whole, "__enter__", entered)
    trainer = make_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    short = make_trainer(tmp_path / "short", callbacks=[At("step_end", 3, stop)])
    short.train()
    assert trainer.train_state.step == 3
    assert ts.digest(trainer.train_state) == ts.digest(short.train_state)


def test_a_handler_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        make_trainer(tmp_path, callbacks=[At("step_end", 2, send(signal.SIGINT))]).train()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT]


# ---- real processes

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import trainstep as ts
from support.shell import make_trainer, samples, scored
from trainer import TrainerCallback, checkpoint
from trainer.interrupt import EXIT_STATUS
os.fsync = lambda handle: None

class Slow(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.005)
    def on_train_begin(self, *args, **kwargs):
        print("begun", flush=True)

def train(folder, enabled=True):
    trainer = make_trainer(
        folder, scored("batch_norm"), train=samples(30), num_train_epochs=8, callbacks=[Slow()],
        enable_jit_checkpoint=enabled, eval_strategy="steps", eval_steps=7,
        save_strategy="steps" if enabled else "no", save_steps=20,
    )
    trainer.train(resume_from_checkpoint=bool(checkpoint.list_checkpoints(folder)))
    records = [r for r in trainer.state.log_history if "eval_loss" in r]
    return repr((ts.digest(trainer.train_state), [(r["step"], r["eval_loss"]) for r in records]))
"""
RANDOMLY = """
root, done = Path(sys.argv[1]), Path(sys.argv[1], "done")
expected = train(root / "whole")
random.seed(0)
interrupted = 0
while not done.exists():
    child = os.fork()
    if child == 0:
        try:
            done.write_text(train(root / "run"))
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.4))
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) in (0, EXIT_STATUS), status
        interrupted += os.WEXITSTATUS(status) == EXIT_STATUS
    else:  # before training began, or after it ended: then the signal does what it always does
        assert os.WTERMSIG(status) == signal.SIGTERM, status
    assert all(checkpoint.verify(path) == [] for path in checkpoint.list_checkpoints(root / "run"))
print(interrupted, done.read_text() == expected)
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    if all(line.strip() != word for line in process.stdout):
        raise AssertionError(process.stderr.read())


@pytest.mark.row(90)
def test_sigterm_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    with start(RANDOMLY, tmp_path) as process:
        output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    interrupted, same = output.splitlines()[-1].split()
    assert int(interrupted) >= 2
    assert same == "True"


def test_a_process_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    with start("train(Path(sys.argv[1]))", tmp_path) as process:
        wait_for(process, "begun")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in errors
    assert "SIGTERM: training was ended after step" in errors


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    code = """
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(20)
checkpoint.io.write = slow
train(Path(sys.argv[1]))
"""
    with start(code, tmp_path) as process:
        wait_for(process, "begun")
        process.send_signal(signal.SIGTERM)
        wait_for(process, "saving")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == -signal.SIGTERM
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_without_the_argument_sigterm_ends_the_process(tmp_path: Path) -> None:
    with start("train(Path(sys.argv[1]), enabled=False)", tmp_path) as process:
        wait_for(process, "begun")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
