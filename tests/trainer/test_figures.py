"""``log_figures``: rates, utilisation, waiting, phases in the records of the loss, and nowhere else."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.shell import (
    At,
    Killed,
    Recorder,
    Scored,
    kill,
    make_trainer,
    samples,
    scored,
    timeless,
)
from trainer import TrainerCallback, figures
from trainer.figures import Figures, peak_operations

ALWAYS = {
    "samples_per_second",
    "steps_per_second",
    "data_wait",
    "time_step",
    "time_evaluate",
    "time_save",
}
GIVEN = {*ALWAYS, "tokens_per_second", "mfu", "peak_memory_gib"}


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Ticking(TrainerCallback):
    """Lets a step take 2 seconds, an evaluation 10 and a checkpoint 30."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 2

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 5  # there are two batches

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 30


class Reading(Scored):
    """Says that ``x`` is its main input, and how many operations a batch takes."""

    main_input_name = "x"

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        return 1000


def records(trainer: Any) -> list[dict[str, Any]]:
    """Return the records of the loss."""
    return [record for record in trainer.state.log_history if "loss" in record]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was warned of."""
    return [each.getMessage() for each in caplog.records if each.name == "trainer.figures"]


def on_device(kind: str, trainer: Any, *, first: bool = True) -> Any:
    """Return what figures ask of ``trainer``, as if it were on a device of that kind."""
    args = SimpleNamespace(
        device=torch.device(kind),
        peak_tflops=None,
        skip_memory_metrics=trainer.args.skip_memory_metrics,
    )
    return SimpleNamespace(
        args=args,
        model=trainer.model,
        state=trainer.state,
        _run=None,
        is_world_process_zero=lambda: first,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Figures.__init__, "__defaults__", (clock,))
    return clock


def run(folder: Path, clock: Clock, model: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(
        folder,
        model or scored(kind=Reading),
        callbacks=[Ticking(clock)],
        log_figures=True,
        **changes,
    )
    trainer.train()
    return trainer


def test_rates_are_those_of_the_steps_alone(clock: Clock, tmp_path: Path) -> None:
    # 10 samples in batches of 4: a step of 2 batches, and one of a single batch of 2.
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    evaluating = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = run(tmp_path, clock, **changes, **evaluating)
    first, last = records(trainer)

    assert (first["steps_per_second"], first["samples_per_second"]) == (0.5, 4)
    assert first["tokens_per_second"] == 4 * 4  # elements of x
    assert (first["time_step"], first["time_evaluate"], first["time_save"]) == (2, 0, 0)
    assert (last["steps_per_second"], last["samples_per_second"]) == (0.5, 1)
    assert (last["time_step"], last["time_evaluate"], last["time_save"]) == (2, 10, 30)


def test_an_evaluation_at_the_start_is_one(clock: Clock, tmp_path: Path) -> None:
    trainer = run(tmp_path, clock, eval_on_start=True, logging_steps=5)
    (record,) = records(trainer)
    assert (record["time_step"], record["time_evaluate"]) == (10, 10)


def test_the_loss_and_the_state_are_as_without(tmp_path: Path) -> None:
    plain, trainer = make_trainer(tmp_path), make_trainer(tmp_path, log_figures=True)
    for each in (plain, trainer):
        each.train()
    assert ts.digest(trainer.train_state) == ts.digest(plain.train_state)
    for mine, theirs in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        added = mine.keys() - theirs.keys()
        assert added == (ALWAYS if "loss" in theirs else set())
        assert all(math.isfinite(mine[name]) for name in added)
        kept = {name: value for name, value in mine.items() if name not in GIVEN}
        assert timeless([kept]) == timeless([theirs])


def test_off_there_is_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer._figures is None
    assert records(trainer)[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def test_utilisation(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, clock, save_strategy="steps", save_steps=2, peak_tflops=100e3 / 1e12)
    # 6 operations for each of 1000 parameters and each of 2 x 4 elements of x, in 2 seconds.
    assert [record["mfu"] for record in records(trainer)] == [6 * 1000 * 8 / 2 / 100e3] * 5
    assert told(caplog) == []


def test_where_no_operations_are_counted_one_line_says_why(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, clock, scored(), peak_tflops=1.0)
    assert all("mfu" not in record for record in records(trainer))
    assert all("tokens_per_second" not in record for record in records(trainer))
    (line,) = told(caplog)
    assert "no mfu, since no operations are counted" in line
    assert "num_parameters(exclude_embeddings=...)" in line
    assert "'input_ids'" in line


def test_on_a_cpu_without_a_peak_there_is_neither_utilisation_nor_a_warning(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert all("mfu" not in record for record in records(run(tmp_path, clock)))
    assert told(caplog) == []


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("first", [True, False])
def test_on_a_device_that_is_not_known_one_line_says_what_to_set(
    kind: str,
    first: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    trainer: Any = on_device(kind, make_trainer(tmp_path), first=first)
    assert Figures(trainer)._peak is None
    name = {"cuda": "Tesla V100-SXM2-32GB", "mps": "mps"}[kind]
    wanted = f"no mfu, since the peak of the device {name!r} is not known. Set peak_tflops"
    assert [wanted in line for line in told(caplog)] == [True] * first

    caplog.clear()
    trainer.args.peak_tflops = 125.0
    assert Figures(trainer)._peak == 125e12
    assert told(caplog) == []


def test_a_peak_that_is_given_goes_before_that_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    trainer = on_device("cuda", make_trainer(tmp_path))
    assert Figures(trainer)._peak == 989e12
    trainer.args.peak_tflops = 494.7  # of TF32
    assert Figures(trainer)._peak == 494.7e12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI325X", 1307.4e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_operations(name) == peak


def test_time_waited_for_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, log_figures=True, logging_steps=2)
    waits: list[float] = []

    class Adding(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            trainer._run.batches.wait.add(3.0)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            waits.append(trainer._run.batches.wait.seconds)

    trainer.add_callback(Adding())
    trainer.train()
    logged = [record["data_wait"] for record in records(trainer)]
    assert [round(wait) for wait in logged] == [6, 6]
    assert sum(logged) < waits[0]


def test_a_resumed_run_counts_what_it_does_itself(clock: Clock, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "num_train_epochs": 2}
    whole = run(tmp_path, clock, **options)
    resumed = make_trainer(
        tmp_path, scored(kind=Reading), callbacks=[Ticking(clock)], log_figures=True, **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    mine, theirs = records(resumed), records(whole)
    assert [record["loss"] for record in mine] == [record["loss"] for record in theirs]
    # The first record after step 3 is of the loss of two steps, and of the speed of one.
    after = [record for record in mine if record["step"] > 3]
    assert [record["time_step"] for record in after] == [2, 4, 4, 4]
    assert {record["steps_per_second"] for record in after} == {0.5}
    assert {record["samples_per_second"] for record in after} == {1.0}


def test_every_training_starts_anew(clock: Clock, tmp_path: Path) -> None:
    trainer = run(tmp_path, clock)
    clock.now += 1000
    trainer.train()
    assert [record["time_step"] for record in records(trainer)] == [2] * 5


def test_after_an_error_in_an_evaluation(clock: Clock, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        tmp_path, callbacks=[Ticking(clock), At("evaluate", 2, kill)], log_figures=True, **changes
    )
    with pytest.raises(Killed):
        trainer.train()
    trainer.train()
    assert [record["time_evaluate"] for record in records(trainer)] == [0, 0, 10, 0, 10]


def test_batches_that_are_no_mappings_count_samples(tmp_path: Path) -> None:
    class Row(Scored):
        def forward(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
            return super().forward(*batch)

    trainer = make_trainer(
        tmp_path,
        scored(kind=Row),
        more={"data_collator": lambda rows: [torch.stack([r[k] for r in rows]) for k in rows[0]]},
        log_figures=True,
        remove_unused_columns=False,
    )
    trainer.train()
    assert all(record["samples_per_second"] > 0 for record in records(trainer))


def test_events_are_the_same(tmp_path: Path) -> None:
    seen = []
    for on in (False, True):
        recorder = Recorder()
        make_trainer(tmp_path, callbacks=[recorder], log_figures=on).train()
        seen.append(recorder.events)
    assert seen[0] == seen[1]


def test_nothing_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, log_figures=True, train=samples(12))
    taken: list[int] = []
    read = Tensor.item

    def item(self: Tensor) -> Any:
        taken.append(1)
        return read(self)

    original = Figures.take

    def take(self: Figures) -> dict[str, float]:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", item)
            patch.setattr(Tensor, "cpu", item)
            return original(self)

    monkeypatch.setattr(figures.Figures, "take", take)
    trainer.train()
    assert taken == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tracked", [False, True])
def test_peak_memory_on_the_gpu(tracked: bool, tmp_path: Path) -> None:
    held: list[Tensor] = []

    def hold(control: Any) -> None:
        held.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
        held.clear()

    trainer = make_trainer(
        tmp_path,
        callbacks=[At("step_end", 2, hold)],
        use_cpu=False,
        log_figures=True,
        skip_memory_metrics=not tracked,
    )
    result = trainer.train()
    peaks = [record["peak_memory_gib"] for record in records(trainer)]
    assert peaks[0] < 0.25 <= peaks[1]
    if tracked:  # the report at the end is of the whole training, so the peak is not taken back
        assert peaks[2] >= 0.25
        # Counted from what was held at the end, a few tensors more than when the peak was reached.
        assert result.metrics["train_mem_gpu_peaked_delta"] > 0.99 * 2**28
    else:
        assert peaks[2] < 0.25
