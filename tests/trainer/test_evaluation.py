"""Evaluation and prediction."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from support.shell import Recorder, Scored, Stream, logged, make_trainer, samples, scored
from trainer import EvalPrediction, Trainer, evaluation


def single(trainer: Any, data: list[Any]) -> list[dict[str, Tensor]]:
    """Run a trainer's model over samples one by one."""
    trainer.model.eval()
    with torch.no_grad():
        return [trainer.model(**{k: v[None] for k, v in row.items()}) for row in data]


def test_the_loss_is_the_mean_over_samples_whatever_the_batch(tmp_path: Path) -> None:
    data = samples(11, seed=3)
    for size in (1, 4, 8, 11, 20):
        trainer = make_trainer(tmp_path, evaluation=data, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        expected = np.mean([float(out["loss"]) for out in single(trainer, data)])
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_is_logged_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, evaluation=samples(5), callbacks=[recorder])
    trainer.model.train()
    before = torch.get_rng_state()
    metrics = trainer.evaluate()

    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert list(metrics) == [
        "eval_loss",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "epoch",
    ]
    assert metrics["epoch"] == 0
    assert trainer.state.log_history == [{**metrics, "step": 0}]
    assert recorder.events[1:] == [
        "prediction_step",
        "prediction_step",
        ("log", "eval"),
        "evaluate",
    ]


def test_prediction_returns_every_row_in_order_and_logs_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    data = samples(7, seed=4)
    trainer = make_trainer(tmp_path, callbacks=[recorder])
    output = trainer.predict(data)

    rows = [out["logits"][0].numpy() for out in single(trainer, data)]
    np.testing.assert_allclose(output.predictions, np.stack(rows), rtol=1e-5)
    np.testing.assert_array_equal(output.label_ids, np.stack([row["labels"] for row in data]))
    assert {"test_loss", "test_runtime"} <= output.metrics.keys()
    assert "epoch" not in output.metrics
    assert trainer.state.log_history == []
    assert recorder.events[1:] == ["prediction_step", "prediction_step", "predict"]


def test_without_labels_there_are_predictions_only(tmp_path: Path) -> None:
    data = [{"x": row["x"]} for row in samples(3)]
    output = make_trainer(tmp_path).predict(data, metric_key_prefix="blind")

    assert output.predictions.shape == (3, 2)
    assert output.label_ids is None
    assert set(output.metrics) == {
        "blind_runtime",
        "blind_samples_per_second",
        "blind_steps_per_second",
    }


class Seen:
    """A ``compute_metrics`` that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[EvalPrediction] = []

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        self.given.append(prediction)
        error = np.abs(prediction.predictions - prediction.label_ids).mean()
        return {
            "error": error,
            "eval_rows": np.array([len(prediction.label_ids)]),
            "n": {"a": error},
        }


def test_metrics_are_computed_from_whole_arrays(tmp_path: Path) -> None:
    seen, data = Seen(), samples(6)
    trainer = make_trainer(tmp_path, evaluation=data, more={"compute_metrics": seen})
    metrics = trainer.evaluate()

    (given,) = seen.given
    assert given.predictions.shape == given.label_ids.shape == (6, 2)
    assert (given.inputs, given.losses) == (None, None)
    assert type(metrics["eval_error"]) is float
    assert (metrics["eval_rows"], type(metrics["eval_rows"])) == (6, int)
    assert metrics["eval_n"] == {"a": metrics["eval_error"]}


def test_metrics_see_inputs_and_losses_if_asked(tmp_path: Path) -> None:
    seen, data = Seen(), samples(6)
    model = scored()
    model.main_input_name = "x"  # type: ignore[assignment]
    trainer = make_trainer(
        tmp_path,
        model,
        evaluation=data,
        more={"compute_metrics": seen},
        include_for_metrics=["inputs", "loss"],
    )
    metrics = trainer.evaluate()

    (given,) = seen.given
    np.testing.assert_array_equal(given.inputs, np.stack([row["x"] for row in data]))
    assert given.losses.shape == (6,)
    assert len(set(given.losses[:4].tolist())) == 1
    assert given.losses.mean().item() == metrics["eval_loss"]


def test_logits_can_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    kept = []

    def reduce(logits: Tensor, labels: Tensor) -> Tensor:
        kept.append((logits.shape, labels.shape))
        return logits.argmax(-1)

    trainer = make_trainer(tmp_path, more={"preprocess_logits_for_metrics": reduce})
    output = trainer.predict(samples(6))

    assert kept == [((4, 2), (4, 2)), ((2, 2), (2, 2))]
    assert output.predictions.shape == (6,)


def test_metrics_can_be_computed_batch_by_batch(tmp_path: Path) -> None:
    calls: list[tuple[int, bool]] = []

    def compute(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        calls.append((len(prediction.predictions), compute_result))
        return {"rows": sum(n for n, _ in calls)} if compute_result else {}

    trainer = make_trainer(
        tmp_path,
        evaluation=samples(9),
        batch_eval_metrics=True,
        more={"compute_metrics": compute},
    )
    assert trainer.evaluate()["eval_rows"] == 9
    assert calls == [(4, False), (4, False), (1, True)]
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").predictions is None
    assert trainer.predict(samples(9)).predictions.shape == (9, 2)


def test_batchwise_metrics_need_a_flag_for_the_last_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give it a parameter compute_result. It takes p$"):
        make_trainer(tmp_path, batch_eval_metrics=True, more={"compute_metrics": lambda p: {}})


@pytest.mark.parametrize("every", [1, 2, None])
def test_outputs_move_to_the_host_without_changing(every: int | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_accumulation_steps=every, per_device_eval_batch_size=2)
    whole = make_trainer(tmp_path, scored(), per_device_eval_batch_size=2).predict(samples(7))

    np.testing.assert_array_equal(trainer.predict(samples(7)).predictions, whole.predictions)


def test_batches_can_be_kept_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_do_concat_batches=False)
    output = trainer.predict(samples(6))

    assert [part.shape for part in output.predictions] == [(4, 2), (2, 2)]
    assert isinstance(output.label_ids, list)


def test_only_the_loss_is_kept_if_that_is_asked(tmp_path: Path) -> None:
    output = make_trainer(tmp_path, prediction_loss_only=True).predict(samples(6))

    assert (output.predictions, output.label_ids) == (None, None)
    assert "test_loss" in output.metrics


class Wordy(Scored):
    """Returns more than logits, in a tuple or a dict, and has two label inputs."""

    tuples = False

    def forward(self, x: Tensor, labels: Any = None, label_weights: Any = None) -> Any:
        logits = self.body(x)
        extra = (x * 2, {"deep": logits[:, :1]})
        if labels is None or label_weights is None:
            return {"logits": logits, "extra": extra[0], "nested": extra[1]}
        loss = (mse_loss(logits, labels, reduction="none").mean(1) * label_weights).mean()
        if self.tuples:
            return (loss, logits, *extra)
        return {
            "loss": loss,
            "logits": logits,
            "hidden": None,
            "extra": extra[0],
            "nested": extra[1],
        }


def wordy(tuples: bool = False) -> Wordy:
    model = scored("mlp", Wordy)
    model.tuples = tuples
    return model


def weighted(n: int) -> list[dict[str, Tensor]]:
    return [{**row, "label_weights": torch.tensor(1.0 + i)} for i, row in enumerate(samples(n))]


@pytest.mark.parametrize("tuples", [False, True])
def test_several_outputs_and_labels_are_tuples(tuples: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wordy(tuples))
    output = trainer.predict(weighted(6))

    logits, extra, nested = output.predictions
    assert logits.shape == (6, 2)
    np.testing.assert_array_equal(extra, np.stack([row["x"] * 2 for row in weighted(6)]))
    np.testing.assert_array_equal(nested["deep"], logits[:, :1])
    labels, scale = output.label_ids
    np.testing.assert_array_equal(scale, np.arange(1.0, 7.0))
    assert labels.shape == (6, 2)
    assert "test_loss" in output.metrics


def test_outputs_can_be_ignored_by_name(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wordy())
    assert trainer.predict(weighted(6), ignore_keys=["extra", "nested"]).predictions.shape == (6, 2)

    class Config:
        keys_to_ignore_at_inference = ("extra", "nested")

    trainer.model.config = Config()
    assert trainer.predict(weighted(6)).predictions.shape == (6, 2)


def test_a_missing_label_means_no_loss(tmp_path: Path) -> None:
    output = make_trainer(tmp_path, wordy()).predict(samples(3))

    assert output.label_ids is None
    assert "test_loss" not in output.metrics


def test_label_names_can_be_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wordy(), label_names=["labels"])
    output = trainer.predict(weighted(6))

    assert output.label_ids.shape == (6, 2)
    assert "test_loss" in output.metrics


class Growing(nn.Module):
    """Its logits are as wide as the longest row of the batch."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": x.mean(), "logits": x[..., None].expand(*x.shape, 2)}


def test_batches_of_different_widths_are_padded_on_the_right(tmp_path: Path) -> None:
    data = [{"x": torch.ones(w), "labels": torch.zeros(w)} for w in (2, 2, 3, 3, 1)]
    trainer = make_trainer(tmp_path, Growing(), per_device_eval_batch_size=2)
    output = trainer.predict(data)

    assert output.predictions.shape == (5, 3, 2)
    assert output.label_ids.tolist() == [
        [0, 0, -100],
        [0, 0, -100],
        [0, 0, 0],
        [0, 0, 0],
        [0, -100, -100],
    ]
    assert (output.predictions[:, :, 0] == -100).tolist() == (output.label_ids == -100).tolist()


def test_a_dict_of_datasets_is_evaluated_one_by_one(tmp_path: Path) -> None:
    sets = {"a": samples(3, seed=1), "b": samples(5, seed=2)}
    recorder = Recorder()
    trainer = make_trainer(tmp_path, evaluation=sets, callbacks=[recorder])
    metrics = trainer.evaluate()

    assert recorder.events.count("evaluate") == 2
    assert [r for r in ("eval_a_loss", "eval_b_loss", "eval_a_runtime") if r not in metrics] == []
    alone = make_trainer(tmp_path, evaluation=sets["b"]).evaluate()
    assert metrics["eval_b_loss"] == alone["eval_loss"]
    assert logged(trainer, "eval_a_loss") == [metrics["eval_a_loss"]]
    assert trainer.evaluate("b")["eval_loss"] == alone["eval_loss"]
    assert (
        trainer.evaluate({"c": sets["a"]}, metric_key_prefix="x")["x_c_loss"]
        == (metrics["eval_a_loss"])
    )


def test_data_without_length_are_evaluated_to_the_end(tmp_path: Path) -> None:
    data = samples(7, seed=5)
    trainer = make_trainer(tmp_path, evaluation=Stream(data))
    metrics = trainer.evaluate()

    assert metrics["eval_loss"] == make_trainer(tmp_path, evaluation=data).evaluate()["eval_loss"]
    assert trainer.predict(Stream(data)).predictions.shape == (7, 2)


def test_an_empty_dataset_gives_no_loss(tmp_path: Path) -> None:
    output = make_trainer(tmp_path).predict([])

    assert (output.predictions, output.label_ids) == (None, None)
    assert "test_loss" not in output.metrics


def test_without_data_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        trainer.evaluate()


class Halving(Trainer):
    """Overrides the loss and the prediction."""

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
        return (loss / 2, outputs) if return_outputs else loss / 2

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, None if logits is None else logits * 0, labels


def test_overrides_are_used(tmp_path: Path) -> None:
    usual = make_trainer(tmp_path).evaluate()["eval_loss"]
    trainer = make_trainer(tmp_path, make=Halving)

    assert trainer.evaluate()["eval_loss"] == pytest.approx(usual / 2)
    assert not trainer.predict(samples(3)).predictions.any()


Point = namedtuple("Point", "x y")


def test_structures_are_joined() -> None:
    parts = [{"a": [np.zeros((2, w))], "b": Point(np.array(w), np.ones(1))} for w in (1, 3)]
    joined = evaluation.join(parts)

    assert joined["a"][0].tolist() == [[0, -100, -100]] * 2 + [[0, 0, 0]] * 2
    assert type(joined["b"]) is Point
    assert joined["b"].x.tolist() == [1, 3]
    with pytest.raises(TypeError, match="different types: list, tuple"):
        evaluation.join([[np.ones(1)], (np.ones(1),)])
    with pytest.raises(TypeError, match="cannot join outputs of type str; expected tensors"):
        evaluation.join(["a", "b"])


def test_batches_are_measured_by_their_first_tensor() -> None:
    zeros = torch.zeros(3, 2)
    assert (
        evaluation.batch_length({"name": "x", "deep": {"t": zeros}, "other": torch.zeros(5)}) == 3
    )
    assert evaluation.batch_length([zeros]) == 3
    assert evaluation.batch_length(torch.zeros(())) == 1
    assert evaluation.batch_length({"a": 1, "b": None}) == 0


def test_bfloat16_becomes_float32() -> None:
    array = evaluation.to_numpy({"a": torch.ones(2, dtype=torch.bfloat16)})["a"]
    assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.array([[3]]), 3),
        (torch.tensor(2.0), 2.0),
        (np.arange(3), [0, 1, 2]),
        ({"a": (np.int64(1), [True])}, {"a": (1, [True])}),
        ("text", "text"),
    ],
)
def test_metrics_become_plain_numbers(value: Any, plain: Any) -> None:
    result = evaluation.plain_numbers(value)

    assert result == plain
    assert type(result) is type(plain)
