"""The loop as a generator of events: order, lengths, stopping."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainstep as ts
from support.shell import (
    At,
    Recorder,
    Stream,
    Watching,
    flat,
    logged,
    make_trainer,
    samples,
    scored,
    stop,
)
from trainer import TrainerCallback, TrainerControl
from trainer.loop import Event, Run, events
from trainer.plan import Plan

STEP = ["pre_optimizer_step", "optimizer_step"]


def steps(number: int, epoch: float, substeps: int = 1) -> list[Any]:
    """The events of one update that ends at ``epoch``, and its log."""
    return [
        "step_begin",
        *["substep_end"] * substeps,
        *STEP,
        ("step_end", number, round(epoch, 6)),
        ("log", "train"),
    ]


EVALUATION = ["prediction_step"] * 2 + [("log", "eval"), "evaluate"]


@pytest.mark.row(2, 115)
def test_the_order_of_events_is_that_of_the_reference(tmp_path: Path) -> None:
    """10 samples, batches of 2, 2 micro-batches; evaluation and saving every 2 steps."""
    recorder = Recorder()
    make_trainer(
        tmp_path,
        callbacks=[recorder],
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    ).train()

    assert recorder.events == [
        "init_end",
        "train_begin",
        "epoch_begin",
        *steps(1, 0.4),
        *steps(2, 0.8),
        *EVALUATION,
        "save",
        *steps(
            3, 1.0, substeps=0
        ),  # the last window is one batch; evaluated and saved all the same
        *EVALUATION,
        "save",
        "epoch_end",
        ("log", "final"),
        "train_end",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.row(3, 4)
@pytest.mark.parametrize(
    ("changes", "updates", "epoch"),
    [
        ({"num_train_epochs": 0.5}, 2, 0.8),
        ({"num_train_epochs": 1.5}, 5, 1.8),
        ({"num_train_epochs": 2.3}, 7, 2.4),
        ({"max_steps": 1}, 1, 0.4),
        ({"max_steps": 4}, 4, 1.4),
        ({"max_steps": 3}, 3, 1.0),
    ],
)
def test_training_is_as_long_as_it_should(
    changes: dict[str, Any], updates: int, epoch: float, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, **changes)
    result = trainer.train()

    assert result.global_step == trainer.state.global_step == trainer.train_state.step == updates
    assert trainer.state.max_steps == updates
    assert trainer.state.epoch == pytest.approx(epoch)
    assert trainer.state.log_history[-1]["epoch"] == pytest.approx(epoch)
    assert logged(trainer, "learning_rate") == pytest.approx(
        [0.05 * (1 - step / updates) for step in range(updates)]
    )


def test_zero_steps_make_one_update_at_rate_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=0)
    result = trainer.train()

    assert result.global_step == 1
    assert logged(trainer, "learning_rate") == [0.0]
    assert result.metrics["train_samples_per_second"] == 0


def test_every_sample_is_seen_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    model = scored("mlp", Watching)
    make_trainer(tmp_path, model, num_train_epochs=2).train()

    seen = [flat(model.seen[i : i + 5]) for i in (0, 5)]
    everything = sorted(row["x"][0].item() for row in samples())
    assert [len(batch) for batch in model.seen] == [2] * 10
    assert sorted(seen[0]) == sorted(seen[1]) == everything
    assert seen[0] != seen[1] != everything


class Sum:
    """An engine whose gradient is the sum of the batches it was given, for one scalar."""

    def __init__(self) -> None:
        self.windows: list[tuple[list[float], int]] = []
        self.draws: list[float] = []
        self._open: list[float] = []

    def passes(self, batches: Any, items: Any, window: int, key: Any) -> Iterator[torch.Tensor]:
        self._window, total = window, torch.zeros(())
        for number, batch in enumerate(batches):
            with ts.rng.seeded(key.fold_in(number)):
                self.draws.append(float(torch.rand(())))
            self._open.append(batch)
            total = total + torch.tensor(float(batch)) / window
            yield total

    def collect(self) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor(float(sum(self._open)))}

    def drop(self) -> None:
        self.windows.append((self._open, self._window))
        self._open = []


def take(batches: Any, count: int) -> tuple[list[Any], int]:
    window = list(islice(batches, count))
    return window, len(window)


def run(
    passes: list[list[float]], plan: Plan, accumulation: int, seed: int = 0, donate: bool = True
) -> tuple[Run, Sum]:
    engine = Sum()
    step = ts.make_step(lambda *a: None, ts.optim.sgd(1.0))  # type: ignore[arg-type,return-value]
    return (
        Run(
            plan=plan,
            step=ts.donate(step) if donate else step,
            state=step.init({"w": torch.zeros(())}, seed),
            engine=engine,
            batches=lambda epoch, skip: passes[min(epoch, len(passes) - 1)][skip:],
            take=lambda batches: take(batches, accumulation),
            control=SimpleNamespace(should_epoch_stop=False, should_training_stop=False),
            accumulation=accumulation,
        ),
        engine,
    )


def unsized(max_steps: int) -> Plan:
    return Plan(10**9, max_steps, max_steps, None, 0, 0, 1)


def drive(loop: Run, max_steps: int) -> list[Event]:
    """Iterate as the trainer does, stopping when the steps are done."""
    seen = []
    for event in events(loop):
        seen.append(event)
        if event is Event.STEP_END and loop.state.step >= max_steps:
            loop.control.should_training_stop = True
    return seen


def test_micro_batches_have_keys_of_their_own_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    loop, engine = run([[1, 2, 3, 4]], Plan(1, 2, 2, 4, 4, 4, 2), 2)
    drive(loop, 2)

    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(engine.draws)) == 4
    key = ts.rng.key(0)
    for number, draw in enumerate(engine.draws):
        with ts.rng.seeded(
            loop.step.loss_key(loop.state.evolve(step=number // 2)).fold_in(number % 2)
        ):
            assert float(torch.rand(())) == draw
    assert loop.state.key == key


def test_the_loss_of_a_step_is_the_sum_of_its_shares() -> None:
    loop, _ = run([[1, 2, 6]], Plan(1, 2, 2, 3, 3, 3, 2), 2)
    losses = [
        loop.metrics["loss"].item() for event in events(loop) if event is Event.OPTIMIZER_STEP
    ]
    assert losses == [1.5, 6.0]
    assert float(loop.state.params["w"]) == -9.0


def test_leftovers_of_a_stream_are_an_update_of_their_own_size() -> None:
    loop, engine = run([[1, 2, 3], [4, 5, 6]], unsized(4), 2)
    seen = drive(loop, 4)

    assert engine.windows == [([1, 2], 2), ([3], 1), ([4, 5], 2), ([6], 1)]
    assert seen.count(Event.SUBSTEP_END) == 2
    assert seen.count(Event.EPOCH_BEGIN) == seen.count(Event.EPOCH_END) == 2


@pytest.mark.row(5, 196)
def test_leftovers_are_not_mixed_into_the_next_pass_of_a_trainer(tmp_path: Path) -> None:
    model = scored("mlp", Watching)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        model,
        train=Stream(samples(6)),
        callbacks=[recorder],
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    trainer.train()
    rows = [row["x"][0].item() for row in samples(6)]

    assert model.seen == [rows[i : i + 2] for i in (0, 2, 4)] * 2
    ends = [event[1:] for event in recorder.events if event[0] == "step_end"]
    assert ends == [(1, 0.25), (2, 0.375), (3, 1.25), (4, 1.375)]  # of 4 steps x 2 micro-batches
    # A leftover batch counts as a whole update: its gradient is that of a run without accumulation.
    alone = make_trainer(tmp_path / "b", scored("mlp"), train=samples(6)[4:], max_steps=1)
    alone.train()
    second = make_trainer(
        tmp_path / "c",
        scored("mlp"),
        train=Stream(samples(6)[4:]),
        gradient_accumulation_steps=2,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    second.train()
    assert logged(second, "grad_norm") == logged(alone, "grad_norm")


def test_an_empty_stream_ends_training_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, train=Stream([]), callbacks=[recorder], max_steps=3)
    result = trainer.train()

    assert result.global_step == 0
    assert "no sample in the training data's iterator: training stops at step 0 of 3" in caplog.text
    assert recorder.events[1:] == [
        "train_begin",
        "epoch_begin",
        "epoch_end",
        ("log", "final"),
        "train_end",
    ]


def test_a_stream_that_runs_dry_stops_after_what_it_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, train=Stream(samples(4), []), max_steps=9)

    assert trainer.train().global_step == 2
    assert "training stops at step 2 of 9" in caplog.text


def epoch_stop(control: Any) -> None:
    control.should_epoch_stop = True


@pytest.mark.row(116)
def test_a_stopped_epoch_gives_way_to_the_next(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[At("step_end", 2, epoch_stop), recorder],
        num_train_epochs=2,
    )
    result = trainer.train()

    names = [e if isinstance(e, str) else e[0] for e in recorder.events]
    assert result.global_step == 7
    assert names.count("epoch_begin") == names.count("epoch_end") == 2
    assert [e[1:] for e in recorder.events if e[0] == "step_end"] == [
        *[(1, 0.2), (2, 0.4)],
        *[(3 + i, round(1.2 + 0.2 * i, 6)) for i in range(5)],
    ]


def test_a_stopped_training_ends_its_epoch_and_itself(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[At("step_end", 2, stop), recorder])

    assert trainer.train().global_step == 2
    assert recorder.events[-5:] == [
        ("step_end", 2, 0.4),
        ("log", "train"),
        "epoch_end",
        ("log", "final"),
        "train_end",
    ]


@pytest.mark.row(116)
@pytest.mark.parametrize("event", ["evaluate", "log", "save", "epoch_end"])
def test_any_event_can_stop_training(event: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        callbacks=[At(event, 5 if event == "epoch_end" else 2, stop)],
        num_train_epochs=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    assert trainer.train().global_step == (5 if event == "epoch_end" else 2)


def test_a_stop_from_outside_is_forgotten_by_the_next_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[At("step_end", 2, stop)])
    trainer.train()

    assert trainer.train().global_step == 5


@pytest.mark.row(116)
def test_a_callback_may_ask_for_log_evaluation_and_checkpoint(tmp_path: Path) -> None:
    def ask(control: Any) -> None:
        control.should_log = control.should_evaluate = control.should_save = True

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, callbacks=[At("step_end", 3, ask), recorder], logging_strategy="no"
    )
    trainer.train()

    assert [record["step"] for record in trainer.state.log_history] == [3, 3, 5]
    start = recorder.events.index(("step_end", 3, 0.6))
    assert recorder.events[start + 1 : start + 7] == [("log", "train"), *EVALUATION, "save"]
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_control_that_a_callback_returns_is_used(tmp_path: Path) -> None:
    class Replacing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return TrainerControl(should_training_stop=state.global_step == 3)

    trainer = make_trainer(tmp_path, callbacks=[Replacing()])
    assert trainer.train().global_step == 3


def test_nothing_is_read_beyond_what_is_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read: list[int] = []

    class Counting(Stream):
        def __iter__(self) -> Any:
            for i, row in enumerate(super().__iter__()):
                read.append(i)
                yield row

    with caplog.at_level(logging.WARNING):
        make_trainer(
            tmp_path, train=Counting(samples(10)), max_steps=2, gradient_accumulation_steps=2
        ).train()
    assert read == list(range(8))
    assert not caplog.records
