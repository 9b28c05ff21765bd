"""Numbers for people."""

import json
import time
from pathlib import Path

import pytest

from trainer import metrics


@pytest.mark.row(114)
def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 102.00004)

    assert metrics.speed_metrics("train", 100.0, 30, 4) == {
        "train_runtime": 2.0,
        "train_samples_per_second": 15.0,
        "train_steps_per_second": 2.0,
    }
    assert metrics.speed_metrics("eval", 99.0) == {"eval_runtime": 3.0}


def test_a_clock_that_stands_still_gives_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 100.0)

    assert metrics.speed_metrics("train", 100.0, 30, 4) == {"train_runtime": 0.0}


def test_prefixes_are_put_once() -> None:
    given = {"loss": 1, "eval_acc": 2, "evaluation": 3}

    assert metrics.with_prefix(given, "eval") == {
        "eval_loss": 1,
        "eval_acc": 2,
        "eval_evaluation": 3,
    }
    assert list(metrics.with_prefix({"acc": 1, "eval_loss": 2, "f1": 3}, "eval")) == [
        "eval_loss",
        "eval_acc",
        "eval_f1",
    ]
    assert metrics.with_prefix({"eval_x": 1}, "eval_a") == {"eval_a_eval_x": 1}


@pytest.mark.parametrize(
    ("name", "given", "advice"),
    [
        (
            "eval_loss",
            ["eval_a_loss", "eval_a_runtime", "eval_b_loss"],
            'name one of their metrics: "a_loss" or "b_loss".',
        ),
        (
            "eval_acuracy",
            ["eval_loss", "eval_accuracy"],
            'Did you mean "accuracy"? Otherwise let compute_metrics return it.',
        ),
        ("eval_bleu", ["eval_loss"], "it gave eval_loss. Let compute_metrics return it."),
    ],
)
def test_a_metric_that_is_not_there_is_looked_for(name: str, given: list[str], advice: str) -> None:
    text = metrics.missing_metric(name, dict.fromkeys(given, 0.0))
    assert text.startswith(f"the evaluation gave no {name}; it gave {', '.join(given)}.")
    assert text.endswith(advice)


@pytest.mark.row(107)
def test_values_are_made_readable() -> None:
    given = {
        "train_mem_cpu_alloc_delta": 5 << 20,
        "train_runtime": 3661.239,
        "eval_runtime": 2,
        "total_flos": float(3 << 30),
        "train_loss": 0.123456,
        "epoch": 3,
        "name": "x",
    }

    assert metrics.format_metrics(given) == {
        "train_mem_cpu_alloc_delta": "5MB",
        "train_runtime": "1:01:01.23",
        "eval_runtime": "0:00:02.00",
        "total_flos": "3GF",
        "train_loss": 0.1235,
        "epoch": 3,
        "name": "x",
    }


@pytest.mark.row(107)
def test_a_table_is_sorted_and_aligned() -> None:
    assert metrics.table("eval", {"loss": 0.25, "accuracy": 12}).splitlines() == [
        "***** eval metrics *****",
        "  accuracy =   12",
        "  loss     = 0.25",
    ]
    assert metrics.table("eval", {}) == "***** eval metrics *****"


@pytest.mark.row(91)
def test_results_are_written_and_merged(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    metrics.write_results(folder, "train", {"b": 1, "a": 2}, combined=True)
    metrics.write_results(folder, "eval", {"a": 3}, combined=True)
    metrics.write_results(folder, "test", {"c": 4}, combined=False)

    assert (folder / "train_results.json").read_text() == '{\n    "a": 2,\n    "b": 1\n}'
    assert json.loads((folder / "all_results.json").read_text()) == {"a": 3, "b": 1}
    assert json.loads((folder / "test_results.json").read_text()) == {"c": 4}
