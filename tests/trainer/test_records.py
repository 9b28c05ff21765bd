"""Records that come a step late, so that nobody waits for the device, are those that came in time."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from support.shell import make_trainer, samples, scored
from trainer import Trainer, TrainerCallback, session
from trainer.meter import Meter


def history(trainer: Any) -> list[dict[str, Any]]:
    """Return the records, without what depends on the clock."""
    return [
        {k: v for k, v in record.items() if not k.endswith(("_runtime", "_per_second"))}
        for record in trainer.state.log_history
    ]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let records be late as those of recorded steps are; gives (step read, steps under way) of each."""
    monkeypatch.setattr(session, "recorded", lambda run: True)
    reads: list[tuple[int, int]] = []
    read = Meter.read

    def reading(self: Meter, step: int) -> float:
        reads.append((step, trainers[-1]._run.state.step))
        return read(self, step)

    trainers: list[Any] = []
    init = Trainer.__init__

    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        trainers.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(Meter, "read", reading)
    monkeypatch.setattr(Trainer, "__init__", remembering)
    return reads


def train(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"num_train_epochs": 2, "logging_steps": 2, "max_steps": -1}
    trainer = make_trainer(folder, scored("dropout"), train=samples(10), **(settings | changes))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logging_steps": 1},
        {"gradient_accumulation_steps": 2, "logging_steps": 1},
        {"eval_strategy": "steps", "eval_steps": 4},
        {"save_strategy": "steps", "save_steps": 4},
        {"logging_strategy": "epoch"},
        {"logging_first_step": True, "disable_tqdm": False},
        {"include_num_input_tokens_seen": True},
    ],
    ids=str,
)
def test_the_records_are_the_same(
    changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = train(tmp_path / "timely", **changes)
    reads = request.getfixturevalue("late")
    assert history(train(tmp_path / "late", **changes)) == history(expected)
    assert len(reads) == sum("loss" in record for record in expected.state.log_history)


def test_numbers_are_read_when_the_next_step_is_under_way(
    late: list[tuple[int, int]], tmp_path: Path
) -> None:
    train(tmp_path)  # 5 steps an epoch
    assert late == [(2, 3), (4, 5), (6, 7), (8, 9), (10, 10)]


def test_a_record_is_in_time_where_something_else_happens_at_its_step(
    late: list[tuple[int, int]], tmp_path: Path
) -> None:
    train(tmp_path, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=6)
    assert late == [(2, 3), (4, 4), (6, 6), (8, 8), (10, 10)]


@pytest.mark.parametrize("event", ["on_log", "on_step_begin", "on_pre_optimizer_step"])
def test_nobody_can_tell(event: str, late: list[tuple[int, int]], tmp_path: Path) -> None:
    class Watching(TrainerCallback):
        pass

    setattr(Watching, event, lambda self, args, state, control, **kwargs: None)
    trainer = make_trainer(
        tmp_path, scored("dropout"), callbacks=[Watching()], max_steps=4, logging_steps=2
    )
    trainer.train()
    assert late == [(2, 2), (4, 4)]


def test_an_overridden_log_is_called_in_time(late: list[tuple[int, int]], tmp_path: Path) -> None:
    class Logging(Trainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)

    trainer = make_trainer(tmp_path, scored("dropout"), make=Logging, max_steps=4, logging_steps=2)
    trainer.train()
    assert late == [(2, 2), (4, 4)]


def test_nothing_of_a_training_is_kept_when_it_is_over(tmp_path: Path) -> None:
    class Watching(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.engine = weakref.ref(trainer._run.engine)

    watching = Watching()
    trainer = make_trainer(tmp_path, callbacks=[watching])
    trainer.train()
    gc.collect()
    assert watching.engine() is None


def test_an_error_loses_no_record(late: list[tuple[int, int]], tmp_path: Path) -> None:
    data = samples(10)
    data[4] = {"x": torch.zeros(1), "labels": torch.zeros(2)}  # cannot be stacked
    trainer = make_trainer(
        tmp_path,
        scored("dropout"),
        train=data,
        train_sampling_strategy="sequential",
        logging_steps=2,
    )
    with pytest.raises(Exception, match="stack"):
        trainer.train()
    assert [record["step"] for record in trainer.state.log_history] == [2]
