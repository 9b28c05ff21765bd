"""Evaluation and prediction."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from support.shell import Recorder, Scored, Stream, logged, make_trainer, samples, scored
from trainer import EvalPrediction, Trainer


def single(trainer: Any, data: list[Any]) -> list[dict[str, Tensor]]:
    """Run a trainer's model over samples one by one."""
    trainer.model.eval()
    with torch.no_grad():
        return [trainer.model(**{k: v[None] for k, v in row.items()}) for row in data]


@pytest.mark.row(62)
def test_the_loss_is_the_mean_over_samples_whatever_the_batch(tmp_path: Path) -> None:
    data = samples(11, seed=3)
    for size in (1, 4, 8, 11, 20):
        trainer = make_trainer(tmp_path, evaluation=data, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        expected = np.mean([float(out["loss"]) for out in single(trainer, data)])
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.row(62)
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


@pytest.mark.row(49, 63)
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


@pytest.mark.row(64)
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


@pytest.mark.row(65)
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


@pytest.mark.row(67)
def test_logits_can_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    kept = []

    def reduce(logits: Tensor, labels: Tensor) -> Tensor:
        kept.append((logits.shape, labels.shape))
        return logits.argmax(-1)

    trainer = make_trainer(tmp_path, more={"preprocess_logits_for_metrics": reduce})
    output = trainer.predict(samples(6))

    assert kept == [((4, 2), (4, 2)), ((2, 2), (2, 2))]
    assert output.predictions.shape == (6,)


@pytest.mark.row(66)
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


@pytest.mark.row(66)
def test_batchwise_metrics_need_a_flag_for_the_last_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give it a parameter compute_result. It takes p$"):
        make_trainer(tmp_path, batch_eval_metrics=True, more={"compute_metrics": lambda p: {}})


@pytest.mark.row(73)
@pytest.mark.parametrize("every", [1, 2, None])
def test_outputs_move_to_the_host_without_changing(every: int | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_accumulation_steps=every, per_device_eval_batch_size=2)
    whole = make_trainer(tmp_path, scored(), per_device_eval_batch_size=2).predict(samples(7))

    np.testing.assert_array_equal(trainer.predict(samples(7)).predictions, whole.predictions)


@pytest.mark.row(72)
def test_batches_can_be_kept_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_do_concat_batches=False)
    output = trainer.predict(samples(6))

    assert [part.shape for part in output.predictions] == [(4, 2), (2, 2)]
    assert isinstance(output.label_ids, list)


@pytest.mark.row(68)
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


@pytest.mark.row(54)
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


@pytest.mark.row(70)
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


@pytest.mark.row(54)
def test_label_names_can_be_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wordy(), label_names=["labels"])
    output = trainer.predict(weighted(6))

    assert output.label_ids.shape == (6, 2)
    assert "test_loss" in output.metrics


class Growing(nn.Module):
    """Its logits are as wide as the longest row of the batch."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": x.mean(), "logits": x[..., None].expand(*x.shape, 2)}


@pytest.mark.row(71)
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


@pytest.mark.row(49, 50)
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


@pytest.mark.row(69)
def test_overrides_are_used(tmp_path: Path) -> None:
    usual = make_trainer(tmp_path).evaluate()["eval_loss"]
    trainer = make_trainer(tmp_path, make=Halving)

    assert trainer.evaluate()["eval_loss"] == pytest.approx(usual / 2)
    assert not trainer.predict(samples(3)).predictions.any()


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (None, "None; is there a return statement"),
        (0.5, "a value of type float"),
        (np.ones(2), "a value of type ndarray"),
        ([("accuracy", 1.0)], "a value of type list"),
    ],
)
@pytest.mark.parametrize("by_batch", [False, True])
def test_metrics_that_are_no_dict_are_refused(
    returned: Any, shown: str, by_batch: bool, tmp_path: Path
) -> None:
    def compute(prediction: EvalPrediction, compute_result: bool = True) -> Any:
        return returned

    trainer = make_trainer(tmp_path, batch_eval_metrics=by_batch, more={"compute_metrics": compute})
    with pytest.raises(
        TypeError, match=rf'must return a dict .*such as {{"accuracy": 0.9}}, but returned {shown}'
    ):
        trainer.evaluate()


def test_metrics_need_names(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, more={"compute_metrics": lambda p: {"a": 1, 3: 2}})
    with pytest.raises(TypeError, match="keys are strings, but returned 3 as a key"):
        trainer.evaluate()


@pytest.mark.row(200)
def test_metrics_that_are_arrays_become_lists_and_can_be_saved(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        more={"compute_metrics": lambda p: {"each": np.arange(3.0), "matrix": torch.eye(2)}},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert trainer.evaluate()["eval_each"] == [0.0, 1.0, 2.0]
    assert logged(trainer, "eval_matrix")[0] == [[1, 0], [0, 1]]
    again = make_trainer(tmp_path, more={"compute_metrics": trainer.compute_metrics})
    again.train(resume_from_checkpoint=True)
    assert logged(again, "eval_each") == [[0.0, 1.0, 2.0]] * 3


def test_metrics_that_lack_labels_are_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blind = [{"x": row["x"]} for row in samples(3)]
    trainer = make_trainer(tmp_path, more={"compute_metrics": Seen()})
    with caplog.at_level(logging.WARNING):
        assert "eval_error" not in trainer.evaluate(blind)
    assert (
        "compute_metrics is not called, because there are no labels. The batches hold x; labels are "
        "looked up under labels. Name the labels in label_names"
    ) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.predict(blind)  # predictions without labels are nothing unusual
        trainer.evaluate()
    assert not caplog.records


def test_metrics_by_batch_know_the_last_of_a_stream(tmp_path: Path) -> None:
    flags: list[bool] = []

    def compute(prediction: EvalPrediction, compute_result: bool) -> dict[str, int]:
        flags.append(compute_result)
        return {"batches": len(flags)}

    trainer = make_trainer(
        tmp_path,
        evaluation=Stream(samples(9)),
        batch_eval_metrics=True,
        more={"compute_metrics": compute},
    )
    assert trainer.evaluate()["eval_batches"] == 3
    assert flags == [False, False, True]


class Detecting(Scored):
    """Returns a list of one dict per sample, of as many boxes as it likes."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        output: dict[str, Any] = super().forward(x, labels)
        output["boxes"] = [
            {"corners": row[: 1 + i % 2], "name": f"n{len(x)}"} for i, row in enumerate(x)
        ]
        return output


@pytest.mark.row(74, 202)
def test_python_objects_are_collected_on_every_call(tmp_path: Path) -> None:
    seen: list[Any] = []

    def compute(prediction: EvalPrediction) -> dict[str, int]:
        seen.append(prediction.predictions)
        return {"boxes": sum(len(sample["corners"]) for sample in prediction.predictions[1])}

    trainer = make_trainer(
        tmp_path,
        scored("mlp", Detecting),
        evaluation=samples(6),
        eval_use_gather_object=True,
        more={"compute_metrics": compute},
    )
    for _ in range(2):
        assert trainer.evaluate()["eval_boxes"] == 9
        logits, boxes = seen.pop()
        assert logits.shape == (6, 2)
        assert [box["name"] for box in boxes] == ["n4"] * 4 + ["n2"] * 2
        corners = [box["corners"].tolist() for box in boxes]
        assert corners == [row["x"][: 1 + i % 2].tolist() for i, row in enumerate(samples(6))]
        assert isinstance(boxes[0]["corners"], np.ndarray)


def test_without_asking_objects_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model = scored("mlp", Detecting)
    with pytest.raises(
        TypeError, match=r"predictions\[1\]: batch 1 has a list of 2 where batch 0 has"
    ):
        make_trainer(tmp_path, model).predict(samples(6))
    apart = make_trainer(tmp_path, model, eval_do_concat_batches=False).predict(samples(6))
    assert [len(boxes) for _, boxes in apart.predictions] == [4, 2]


class Fickle(Scored):
    """Returns other outputs in training than for a batch that is not full."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = super().forward(x, labels)
        return {**output, "more": x} if len(x) < 4 else output


def test_outputs_of_different_structure_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match=r"predictions: batch 1 has a tuple of 2 where batch 0 has a value of type ndarray.*"
        "eval_do_concat_batches=False",
    ):
        make_trainer(tmp_path, scored("mlp", Fickle)).predict(samples(6))
    labelled = [*samples(4), *({"x": row["x"]} for row in samples(2))]
    with pytest.raises(ValueError, match="1 of 2 batches have no labels"):
        make_trainer(tmp_path).predict(labelled)


@pytest.mark.row(67)
def test_outputs_that_were_reduced_do_not_stay_in_memory(tmp_path: Path) -> None:
    outputs: list[Any] = []
    most: list[int] = []

    def reduce(logits: Tensor, labels: Tensor) -> Tensor:
        gc.collect()
        outputs.append(weakref.ref(logits))
        most.append(sum(ref() is not None for ref in outputs))
        return logits[:, :1]  # a view

    trainer = make_trainer(
        tmp_path, per_device_eval_batch_size=1, more={"preprocess_logits_for_metrics": reduce}
    )
    output = trainer.predict(samples(12))
    assert output.predictions.shape == (12, 1)
    assert max(most) <= 2


def test_modules_go_back_to_the_mode_that_each_had(tmp_path: Path) -> None:
    model = scored("dropout")
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    frozen.eval()
    modes = [m.training for m in model.modules()]
    make_trainer(tmp_path, model).evaluate()
    assert [m.training for m in model.modules()] == modes


class Caching(Scored):
    """Computes a table when it first runs, and uses it from then on."""

    table: Tensor | None = None

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        if self.table is None:
            self.table = torch.linspace(1, 2, 2)
        logits = self.body(x) * self.table
        return {"logits": logits, "loss": mse_loss(logits, labels)}


def test_what_an_evaluation_computed_can_be_trained_with(tmp_path: Path) -> None:
    """Tensors made under ``torch.inference_mode`` could not."""
    trainers = [
        make_trainer(tmp_path, scored("mlp", Caching), eval_on_start=first)
        for first in (True, False)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "loss") == logged(trainers[1], "loss")


def test_a_batch_that_does_not_fit_is_shown_with_what_the_model_takes(tmp_path: Path) -> None:
    data = [{"pixels": row["x"], "labels": row["labels"]} for row in samples(3)]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'") as raised:
        make_trainer(tmp_path).evaluate(data)
    assert raised.value.__notes__ == [
        "while evaluating on the batch {labels: (3, 2) float32}; the model's forward takes x, labels"
    ]


def test_data_of_which_nothing_reaches_the_model_are_explained(tmp_path: Path) -> None:
    data = [{"pixels": row["x"], "name": "a"} for row in samples(3)]
    with pytest.raises(
        ValueError,
        match=r"none of the data's keys \(pixels, name\) reaches the model, whose forward takes x, "
        r"labels. Rename the keys, or set remove_unused_columns=False",
    ):
        make_trainer(tmp_path).evaluate(data)
