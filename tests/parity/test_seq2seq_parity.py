"""Generating in evaluation and prediction gives what the Hugging Face Seq2SeqTrainer gives."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.generation import MODELS, padded, pairs
from support.shell import options, timeless
from trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments

transformers = pytest.importorskip("transformers")

LIMIT = 20
"""Set for all models: theirs writes this number, its default, into the model after the first batch, so
that the batches after it are one token shorter."""


def ours_and_theirs(folder: Path, model: Any, **settings: Any) -> list[Any]:
    """Build both trainers on copies of a model."""
    model.generation_config.max_length = LIMIT
    more = {k: settings.pop(k) for k in ("compute_metrics", "data_collator") if k in settings}
    arguments = {"predict_with_generate": True, "per_device_eval_batch_size": 2} | settings
    built = []
    for make, arguments_of in (
        (Seq2SeqTrainer, Seq2SeqTrainingArguments),
        (transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
    ):
        args = arguments_of(**options(folder / make.__module__, **arguments))
        data = {"train_dataset": pairs(4, seed=2), "eval_dataset": pairs(4, seed=1)}
        built.append(make(copy.deepcopy(model), args, **data, **more))
    return built


def run(trainer: Any, act: Any) -> Any:
    with warnings.catch_warnings():
        if not isinstance(trainer, Seq2SeqTrainer):
            warnings.simplefilter("ignore")
        return act(trainer)


def without_padding(rows: Any, pad: int) -> list[list[int]]:
    """Drop what follows the last token: theirs is as wide as the model's own limit, or more."""
    stripped = []
    for row in rows.tolist():
        while row and row[-1] in (pad, -100):
            row.pop()
        stripped.append(row)
    return stripped


@pytest.mark.row(131, 132)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"generation_num_beams": 3}, {"generation_max_length": 7}, {"generation_max_length": 30}],
    ids=str,
)
@pytest.mark.parametrize(
    "call", [{}, {"max_new_tokens": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_predictions_are_the_same(name: str, changes: Any, call: Any, tmp_path: Path) -> None:
    model: Any = MODELS[name]()
    pair = ours_and_theirs(tmp_path, model, **changes)
    ours, other = (run(t, lambda t: t.predict(pairs(6, seed=3), **call)) for t in pair)

    own_limit = "generation_max_length" not in changes and "max_new_tokens" not in call
    pad = model.config.pad_token_id
    for part in ("predictions", "label_ids"):
        mine, given = getattr(ours, part), getattr(other, part)
        assert mine.dtype == given.dtype
        if own_limit:
            np.testing.assert_array_equal(mine, given)
        else:
            assert without_padding(mine, pad) == without_padding(given, pad)
    assert ours.metrics["test_loss"] == other.metrics["test_loss"]


def test_ragged_batches_are_the_same(tmp_path: Path) -> None:
    data = [pairs(1, length=3 + i, labels=2 + 4 * i, seed=i)[0] for i in range(4)]
    pair = ours_and_theirs(tmp_path, MODELS["t5"](), data_collator=padded)
    ours, other = (run(t, lambda t: t.predict(data)) for t in pair)

    assert without_padding(ours.predictions, 0) == without_padding(other.predictions, 0)
    assert without_padding(ours.label_ids, 0) == without_padding(other.label_ids, 0)
    assert ours.metrics["test_loss"] == other.metrics["test_loss"]


def test_smoothed_losses_are_the_same(tmp_path: Path) -> None:
    data = [{**row, "decoder_input_ids": row["labels"].roll(1)} for row in pairs(6)]
    pair = ours_and_theirs(tmp_path, MODELS["bart"](), label_smoothing_factor=0.2)
    ours, other = (run(t, lambda t: t.predict(data)) for t in pair)
    assert ours.metrics["test_loss"] == pytest.approx(other.metrics["test_loss"], rel=1e-6)


@pytest.mark.parametrize("generate", [True, False])
def test_evaluations_during_training_are_the_same(generate: bool, tmp_path: Path) -> None:
    def compute(prediction: Any) -> dict[str, float]:
        predictions, labels = prediction
        if isinstance(predictions, tuple):
            predictions = predictions[0].argmax(-1)
        return {"sum": float(np.where(predictions > 2, predictions, 0).sum()), "n": len(labels)}

    pair = ours_and_theirs(
        tmp_path,
        MODELS["t5"](),
        compute_metrics=compute,
        eval_strategy="steps",
        eval_steps=1,
        predict_with_generate=generate,
        learning_rate=2.0,
        generation_max_length=9,
    )
    histories = []
    for trainer in pair:
        run(trainer, lambda t: t.train())
        histories.append(timeless(trainer.state.log_history))
    evaluated = [[r for r in history if "eval_loss" in r] for history in histories]
    assert len(evaluated[0]) == 2
    assert evaluated[0][0]["eval_sum"] != evaluated[0][1]["eval_sum"]
    assert evaluated[0] == evaluated[1]
