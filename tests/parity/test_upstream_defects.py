"""One check, two trainers: what ours keeps and the Hugging Face Trainer 5.6.1 does not.

The peer's cases are strict expected failures: one that passes fails the test, because then the defect
is gone and the row in the parity table should say so.
"""

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.peer import each as both
from support.shell import Stream, Watching, samples, scored, weights
from trainer import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")

Make = Callable[..., Any]

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}


def same(a: Any, b: Any) -> bool:
    left, right = weights(a), weights(b)
    return all(torch.equal(left[name], right[name]) for name in left)


def resumed_equals_whole(
    make: Make, folder: Path, step: int, model: Callable[[], Any], **options: Any
) -> bool:
    """Train; train again from a checkpoint in the middle, with other generators; compare."""
    settings = {**SAVING, **options}
    whole = make(folder / "whole", model(), **settings)
    whole.train()
    again = make(folder / "again", model(), **settings)
    random.seed(99)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    return same(whole, again)


def noisy_collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = torch.utils.data.default_collate(rows)
    return {**batch, "x": batch["x"] + torch.randn(batch["x"].shape)}


@pytest.mark.row(192)
@both
@pytest.mark.parametrize("workers", [0, 2])
def test_a_random_collator_draws_the_same_after_resuming(
    make: Make, workers: int, tmp_path: Path
) -> None:
    more = {"data_collator": noisy_collate}
    assert resumed_equals_whole(
        make, tmp_path, 3, lambda: scored("mlp"), more=more, dataloader_num_workers=workers
    )


class Noisy(torch.utils.data.Dataset[Any]):
    """Adds noise to a sample each time that it is read."""

    def __init__(self) -> None:
        self.rows = samples(10)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {**row, "x": row["x"] * (1 + random.random() / 10)}


@pytest.mark.row(85)
@both
def test_a_random_dataset_draws_the_same_after_resuming(make: Make, tmp_path: Path) -> None:
    assert resumed_equals_whole(make, tmp_path, 3, lambda: scored("mlp"), train=Noisy())


def sized_rows(n: int = 12) -> list[dict[str, Tensor]]:
    """Samples whose ``input_ids`` have different lengths, for grouping by length."""
    return [
        {**row, "input_ids": torch.zeros(1 + 5 * i % 7, dtype=torch.long)}
        for i, row in enumerate(samples(n))
    ]


def without_ids(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return torch.utils.data.default_collate([{"x": r["x"], "labels": r["labels"]} for r in rows])


@pytest.mark.row(193)
@both
def test_grouping_by_length_goes_on_in_the_second_epoch(make: Make, tmp_path: Path) -> None:
    assert resumed_equals_whole(
        make,
        tmp_path,
        8,
        lambda: scored("mlp"),
        train=sized_rows(),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        more={"data_collator": without_ids},
    )


@pytest.mark.row(195)
@both
def test_a_stream_goes_on_in_its_second_pass(make: Make, tmp_path: Path) -> None:
    def stream() -> Any:
        return Stream(samples(6))

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", scored("mlp", Watching), train=stream(), **options)
    whole.train()
    again = make(tmp_path / "again", scored("mlp", Watching), train=stream(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.model.seen == whole.model.seen[4:]


@pytest.mark.row(196)
@both
def test_left_over_batches_of_a_stream_are_not_mixed_into_the_next_pass(
    make: Make, tmp_path: Path
) -> None:
    """Three batches a pass, two to an update: updates two and four have one batch each, or none."""
    norms: list[float] = []
    trainer = make(
        tmp_path,
        scored("mlp"),
        train=Stream(samples(6)),
        max_steps=4,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_grad_norm=1e9,
    )
    trainer.train()
    norms = [r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r]
    # With weights that do not move, every pass has to look like the first.
    assert norms[:2] == pytest.approx(norms[2:4], rel=1e-6)


@pytest.mark.row(185)
@both
def test_the_training_loss_of_a_resumed_run_is_that_of_the_whole(
    make: Make, tmp_path: Path
) -> None:
    whole = make(tmp_path / "whole", scored("mlp"), **SAVING).train()
    again = make(tmp_path / "again", scored("mlp"), **SAVING).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6")
    )
    assert again.training_loss == pytest.approx(whole.training_loss, rel=1e-6)


@pytest.mark.row(186)
@both
def test_the_speed_of_a_resumed_run_counts_its_own_samples(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "whole", scored("mlp"), **SAVING).train()
    metrics = (
        make(tmp_path / "again", scored("mlp"), **SAVING)
        .train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
        .metrics
    )
    # One update of two samples was made. Runtime and rates are rounded.
    seen = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert seen == pytest.approx(2, rel=0.2)


@pytest.mark.row(187)
@both
def test_a_new_logging_interval_takes_effect_on_resume(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "whole", scored("mlp"), **SAVING).train()
    trainer = make(tmp_path / "again", scored("mlp"), **{**SAVING, "logging_steps": 3})
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    steps = [r["step"] for r in trainer.state.log_history if "loss" in r and r["step"] > 3]
    assert steps == [6, 9]


@pytest.mark.row(189)
@both
def test_moments_that_are_not_restored_are_warned_of(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "whole", scored("mlp"), **SAVING).train()
    folder = tmp_path / "whole" / "checkpoint-3"
    for file in folder.glob("optimizer*"):
        file.unlink()
    libraries = ("trainer", "transformers")
    with pytest.MonkeyPatch.context() as patch:
        for name in libraries:
            patch.setattr(logging.getLogger(name), "propagate", True)
        trainer = make(tmp_path / "again", scored("mlp"), **SAVING)
        with contextlib.suppress(CheckpointError):  # says more than a warning
            trainer.train(resume_from_checkpoint=str(folder))
            assert any("optimizer" in r.getMessage() for r in caplog.records if r.levelno >= 30)


@pytest.mark.row(190)
@both
def test_a_folder_that_was_cut_off_is_passed_over(make: Make, tmp_path: Path) -> None:
    whole = make(tmp_path, scored("mlp"), **SAVING)
    whole.train()
    expected = weights(whole)
    newest = tmp_path / "checkpoint-10"
    shutil.rmtree(newest)
    newest.mkdir()
    (newest / "config.json").write_text("{}")  # the crash came right after the first file
    trainer = make(tmp_path, scored("mlp"), **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(expected[name], t) for name, t in weights(trainer).items())


@pytest.mark.row(200)
@both
def test_metrics_that_are_arrays_do_not_stop_a_save(make: Make, tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        scored("mlp"),
        eval_strategy="steps",
        eval_steps=1,
        more={"compute_metrics": lambda p: {"mean": p.predictions.mean(0)}},
        **SAVING,
    )
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())


@pytest.mark.row(199)
@both
def test_the_best_weights_are_loaded_also_from_between_two_saves(
    make: Make, tmp_path: Path
) -> None:
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.1, *[0.05] * 9])
    best: dict[str, Tensor] = {}
    trainer: Any = None

    def score(_: Any) -> dict[str, float]:
        value = next(scores)
        if value == 0.9:
            best.update(weights(trainer))
        return {"score": value}

    trainer = make(
        tmp_path,
        scored("mlp"),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        more={"compute_metrics": score},
    )
    trainer.train()
    assert all(torch.equal(best[name], t) for name, t in weights(trainer).items())


@pytest.mark.row(206)
@both
def test_no_file_holds_the_token(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, scored("mlp"), hub_token="a-secret-token", **SAVING)
    trainer.train()
    trainer.save_model()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"a-secret-token" in file.read_bytes()]
