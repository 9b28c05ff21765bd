"""Evaluation and prediction give the Hugging Face Trainer's numbers and arrays, to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.peer import Side, both, texts, tiny
from support.shell import Scored, Stream, samples, scored

pytest.importorskip("transformers")


def assert_same(given: Any, wanted: Any) -> None:
    """Assert that two nested outputs have the same structure, types, dtypes and bits."""
    assert type(given) is type(wanted)
    if isinstance(wanted, tuple | list):
        assert len(given) == len(wanted)
        for one, other in zip(given, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, dict):
        assert given.keys() == wanted.keys()
        for key in wanted:
            assert_same(given[key], wanted[key])
    elif isinstance(wanted, np.ndarray):
        assert given.dtype == wanted.dtype
        np.testing.assert_array_equal(given, wanted)
    else:
        assert given == wanted


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Drop what depends on the clock; the Hugging Face Trainer also reports its preparation."""
    ends = ("_runtime", "_per_second", "_preparation_time")
    return {key: value for key, value in metrics.items() if not key.endswith(ends)}


def assert_same_outputs(ours: Side, other: Side) -> None:
    """Assert that two ``PredictionOutput`` are equal but for times."""
    assert_same(ours.result.predictions, other.result.predictions)
    assert_same(ours.result.label_ids, other.result.label_ids)
    assert untimed(ours.result.metrics) == untimed(other.result.metrics)
    assert ours.events == other.events


class Wide(Scored):
    """Several outputs and several labels, as a dict or as a tuple."""

    tuples = False

    def forward(self, x: Tensor, labels: Any = None, extra_labels: Any = None) -> Any:
        out = super().forward(x, labels)
        out["pair"] = (out["logits"] * 2, x.sum(1))
        if extra_labels is not None:
            out["loss"] = out["loss"] + (x.sum(1) - extra_labels).square().mean()
        return tuple(out.values()) if self.tuples else out


def wide(tuples: bool) -> Wide:
    model = scored("mlp", Wide)
    model.tuples = tuples
    return model


def doubly_labelled(n: int) -> list[dict[str, Tensor]]:
    return [{**row, "extra_labels": torch.tensor(float(i))} for i, row in enumerate(samples(n))]


@pytest.mark.row(63)
@pytest.mark.parametrize("n", [8, 11])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"prediction_loss_only": True},
        {"per_device_eval_batch_size": 3},
        {"label_names": ["labels"]},
        {"dataloader_drop_last": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tuples", [False, True])
def test_predictions_are_the_same(
    tuples: bool, changes: dict[str, Any], n: int, tmp_path: Path
) -> None:
    ours, other = both(tmp_path, wide(tuples), lambda t: t.predict(doubly_labelled(n)), **changes)

    assert_same_outputs(ours, other)


def test_predictions_without_labels_and_with_ignored_outputs_are_the_same(tmp_path: Path) -> None:
    blind = [{"x": row["x"]} for row in samples(6)]
    cases = [
        lambda t: t.predict(blind),
        lambda t: t.predict(samples(6)),
        lambda t: t.predict(doubly_labelled(6), ignore_keys=["pair"]),
        lambda t: t.predict(doubly_labelled(6), metric_key_prefix="final"),
    ]
    for number, act in enumerate(cases):
        assert_same_outputs(*both(tmp_path / str(number), wide(False), act))


class Ragged(nn.Module):
    """Logits as wide as the batch, so that batches have to be padded to one width."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = (x * self.scale)[..., None].expand(*x.shape, 3)
        return {"loss": (logits.sum(-1) - labels).square().mean(), "logits": logits, "first": x}


@pytest.mark.row(71)
def test_ragged_batches_are_padded_alike(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = []
    for width in (2, 2, 3, 3, 3, 3, 1):
        row = torch.randn(width, generator=generator)
        data.append({"x": row, "labels": row.round()})
    ours, other = both(tmp_path, Ragged(), lambda t: t.predict(data), per_device_eval_batch_size=2)

    assert -100 in ours.result.label_ids
    assert_same_outputs(ours, other)


class Kept:
    """A ``compute_metrics`` that keeps its arrays."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, prediction: Any) -> dict[str, Any]:
        self.given.append(tuple(prediction))
        logits = prediction.predictions[0]
        return {"mean": logits.mean(), "eval_count": np.array([len(logits)]), "deep": {"a": [1]}}


@pytest.mark.row(64, 65)
@pytest.mark.parametrize("asked", [[], ["inputs"], ["loss"], ["inputs", "loss"]])
def test_metrics_are_computed_from_the_same_arrays(asked: list[str], tmp_path: Path) -> None:
    model = wide(False)
    model.main_input_name = "x"  # type: ignore[assignment]
    seen: list[Kept] = []

    def act(trainer: Any) -> Any:
        seen.append(Kept())
        trainer.compute_metrics = seen[-1]
        return trainer.evaluate()

    ours, other = both(
        tmp_path,
        model,
        act,
        evaluation=doubly_labelled(11),
        include_for_metrics=asked,
        per_device_eval_batch_size=4,
    )
    assert_same(seen[0].given, seen[1].given)
    assert untimed(ours.result) == untimed(other.result)
    assert list(untimed(ours.result)) == list(untimed(other.result))
    assert list(untimed(ours.history[0])) == list(untimed(other.history[0]))
    assert ours.events == other.events


@pytest.mark.row(66)
@pytest.mark.parametrize("asked", [[], ["inputs", "loss"]])
def test_metrics_by_batch_are_the_same(asked: list[str], tmp_path: Path) -> None:
    seen: list[list[Any]] = []

    def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
        (logits, _), rest = prediction.predictions, list(prediction)[1:]
        seen[-1].append((compute_result, logits.tolist(), [str(part) for part in rest]))
        return {"count": len(seen[-1])} if compute_result else {}

    def act(trainer: Any) -> Any:
        seen.append([])
        return trainer.evaluate()

    model = wide(False)
    model.main_input_name = "x"  # type: ignore[assignment]
    ours, other = both(
        tmp_path,
        model,
        act,
        evaluation=doubly_labelled(11),
        batch_eval_metrics=True,
        include_for_metrics=asked,
        per_device_eval_batch_size=4,
        more={"compute_metrics": compute},
    )
    assert seen[0] == seen[1]
    assert untimed(ours.result) == untimed(other.result)
    assert_same_outputs(
        *both(
            tmp_path / "predict",
            wide(False),
            lambda t: t.predict(doubly_labelled(11)),
            batch_eval_metrics=True,
            more={"compute_metrics": lambda prediction, compute_result: {}},
        )
    )


@pytest.mark.row(67)
def test_reduced_logits_are_the_same(tmp_path: Path) -> None:
    ours, other = both(
        tmp_path,
        wide(False),
        lambda t: t.predict(doubly_labelled(7)),
        more={"preprocess_logits_for_metrics": lambda logits, labels: logits[0].argmax(-1)},
    )
    assert_same_outputs(ours, other)


@pytest.mark.row(50)
def test_several_datasets_are_evaluated_alike(tmp_path: Path) -> None:
    data = {"a": samples(5), "b": samples(9, seed=3)}

    def act(trainer: Any) -> Any:
        return [trainer.evaluate(), trainer.evaluate("b"), trainer.evaluate({"c": data["a"]})]

    ours, other = both(tmp_path, scored("mlp"), act, evaluation=data)
    assert [untimed(m) for m in ours.result] == [untimed(m) for m in other.result]
    assert ours.events == other.events


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_are_evaluated_alike(name: str, tmp_path: Path) -> None:
    data = texts(11, ignored=4)
    model = tiny(name)
    metrics = both(tmp_path / "a", model, lambda t: t.evaluate(), evaluation=data)
    assert untimed(metrics[0].result) == untimed(metrics[1].result)

    assert_same_outputs(*both(tmp_path / "b", model, lambda t: t.predict(data)))


def test_evaluation_of_a_stream_is_the_same(tmp_path: Path) -> None:
    """All batches are full: the Hugging Face Trainer would count the samples of a last, short one
    more than once.
    """
    data = samples(8)
    ours, other = both(
        tmp_path,
        scored("mlp"),
        lambda t: t.predict(Stream(data)),
        accelerator_config={"dispatch_batches": False},
    )
    assert_same_outputs(ours, other)
