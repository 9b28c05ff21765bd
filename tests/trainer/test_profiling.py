"""``Trainer.profile``: a trace and a table of some steps, and a training that is as without."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import trainstep as ts
from support.shell import At, Killed, kill, make_trainer, samples, stop
from trainer import ProfilerCallback, TrainerCallback, profiling


def traced(folder: Path) -> list[str]:
    """Return the names of the steps in a trace, in order."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    marked = [e for e in events if str(e.get("name", "")).startswith("training step")]
    return [e["name"] for e in sorted(marked, key=lambda e: e["ts"])]


def armed(trainer: Any) -> bool:
    return any(isinstance(c, ProfilerCallback) for c in trainer.callback_handler.callbacks)


def test_the_steps_asked_for_are_recorded(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=2, log_level="info")
    trainer.profile(steps=3, wait=4)
    assert armed(trainer)
    with caplog.at_level(logging.INFO, logger="trainer"):
        trainer.train()

    folder = tmp_path / "profile"
    assert traced(folder) == ["training step 5", "training step 6", "training step 7"]
    lines = (folder / "table.txt").read_text().splitlines()
    assert lines[0].startswith("3 steps, ")
    assert lines[2].split() == ["ms", "a", "step", "share", "calls", "a", "step", "operation"]
    assert 10 < len(lines) <= 3 + profiling.ROWS
    assert any("aten::addmm" in line for line in lines)
    assert not any("training step" in line for line in lines)
    (message,) = (r.message for r in caplog.records if r.message.startswith("Profile in"))
    assert str(folder) in message
    assert "\n".join(lines[:4]) in message
    assert not armed(trainer)
    assert trainer.state.global_step == 10


@pytest.mark.parametrize("wait", [0, 2])
def test_training_is_as_without(wait: int, tmp_path: Path) -> None:
    plain, profiled = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    profiled.profile(2, wait, tmp_path / "here")
    for trainer in (plain, profiled):
        trainer.train()
    assert ts.digest(profiled.train_state) == ts.digest(plain.train_state)
    assert traced(tmp_path / "here") == [f"training step {wait + i}" for i in (1, 2)]
    assert not (tmp_path / "b" / "profile").exists()


def test_only_the_next_training_is_profiled(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.profile(1, 1)
    trainer.train()
    (tmp_path / "profile" / "trace.json").unlink()
    trainer.train()
    assert not (tmp_path / "profile" / "trace.json").exists()
    trainer.profile(1, 2)
    trainer.train()
    assert traced(tmp_path / "profile") == ["training step 3"]


def test_arming_again_replaces(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path)
    trainer.profile(1, 0)
    trainer.profile(1, 3)
    assert "is added although there is one already" not in caplog.text
    trainer.train()
    assert traced(tmp_path / "profile") == ["training step 4"]


@pytest.mark.parametrize("ending", ["steps", "callback"])
def test_a_training_that_is_too_short(ending: str, tmp_path: Path, caplog: Any) -> None:
    options: dict[str, Any] = {"max_steps": 4} if ending == "steps" else {}
    callbacks = [] if ending == "steps" else [At("step_end", 4, stop)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    trainer.profile(steps=5, wait=2)
    trainer.train()
    assert "ended after 2 of the 5 steps to profile" in caplog.text
    assert traced(tmp_path / "profile") == ["training step 3", "training step 4"]
    assert not armed(trainer)


@pytest.mark.parametrize("wait", [5, 6, 50])
def test_a_training_that_ends_before(wait: int, tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path)
    trainer.profile(steps=5, wait=wait)
    trainer.train()
    assert f"the training ended after 5 steps, and profiling waits for {wait}" in caplog.text
    assert not (tmp_path / "profile").exists()
    assert not armed(trainer)
    assert not torch.autograd._profiler_enabled()


class Closing(TrainerCallback):
    """Is told to close when an error ends a training."""

    closed = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("event", ["step_begin", "step_end"])
def test_an_error_ends_the_recording(event: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[At(event, 3, kill)])
    trainer.profile(steps=10, wait=1)
    after = Closing()
    trainer.add_callback(after)
    with pytest.raises(Killed):
        trainer.train()
    assert not torch.autograd._profiler_enabled()
    assert not armed(trainer)
    assert after.closed == 1  # those that come after it, too
    assert not (tmp_path / "profile").exists()
    trainer.train()
    assert trainer.state.global_step == 5


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(tmp_path)
    trainer.profile(1, 1, tmp_path / "file")
    trainer.train()
    assert "The profile was not written, training goes on" in caplog.text
    assert trainer.state.global_step == 5


def test_the_callback_in_a_script_records_every_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[ProfilerCallback(steps=1, wait=1)])
    for _ in range(2):
        trainer.train()
        assert traced(tmp_path / "profile") == ["training step 2"]
        (tmp_path / "profile" / "trace.json").unlink()
        assert armed(trainer)


def test_only_the_first_process_records(tmp_path: Path) -> None:
    callback = ProfilerCallback(1, 0)
    args = SimpleNamespace(process_index=1, device=torch.device("cpu"), output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=1, max_steps=9)
    callback.on_train_begin(args, state, None)
    callback.on_step_begin(args, state, None)
    callback.on_step_end(args, state, None)
    callback.on_train_end(args, state, None)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_with_another_batch_size_starts_over(tmp_path: Path) -> None:
    class Full(TrainerCallback):
        left = 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and self.left:
                self.left = 0
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make_trainer(
        tmp_path,
        callbacks=[Full()],
        train=samples(24),
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
    )
    trainer.profile(2, 1)
    trainer.train()
    assert traced(tmp_path / "profile") == ["training step 2", "training step 3"]


@pytest.mark.parametrize("options", [{"steps": 0}, {"wait": -1}])
def test_what_makes_no_sense_is_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"got steps=.*{next(iter(options.values()))}"):
        make_trainer(tmp_path).profile(**options)


def event(start: float, end: float, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "time_range": SimpleNamespace(start=start, end=end),
        "device_type": DeviceType.CUDA,
        "is_user_annotation": False,
        "key": "kernel",
    }
    return SimpleNamespace(**(fields | changes))


def test_time_in_which_the_gpu_is_busy() -> None:
    events = [
        event(10, 20),
        event(15, 17),
        event(18, 25),
        event(40, 50),
        event(0, 99, device_type=DeviceType.CPU),
        event(0, 99, is_user_annotation=True),
        event(0, 99, key="training step 3"),
    ]
    assert profiling._union(profiling._device_intervals(events)) == 15 + 10


def test_the_table_has_the_longest_operations_first() -> None:
    found = [profiling._Operation(f"op{i}", i, 1000.0 * i) for i in range(1, 31)]
    _, *rows = profiling._rows(found, steps=2)
    assert len(rows) == profiling.ROWS
    assert rows[0].split() == ["15.000", "6.5%", "15.0", "op30"]
    assert rows[-1].split()[-1] == "op11"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", ["auto", "off"])
def test_on_the_gpu_kernels_and_idle_time(capture: str, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a", use_cpu=False, num_train_epochs=4, capture=capture)
    trainer = make_trainer(tmp_path / "b", use_cpu=False, num_train_epochs=4, capture=capture)
    trainer.profile(steps=4, wait=8)
    for each in (plain, trainer):
        each.train()
    assert ts.digest(trainer.train_state) == ts.digest(plain.train_state)
    folder = tmp_path / "b" / "profile"
    lines = (folder / "table.txt").read_text().splitlines()
    share = float(lines[1].removeprefix("The GPU is idle for ").split("%")[0])
    assert 0 < share < 100
    assert len(lines) > 6
    kinds = {e.get("cat") for e in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert "kernel" in kinds
