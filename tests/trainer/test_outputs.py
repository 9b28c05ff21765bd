"""The records that training, evaluation and prediction hand out."""

import pytest

from trainer import EvalPrediction, TrainOutput
from trainer.outputs import EvalLoopOutput, PredictionOutput


@pytest.mark.parametrize(
    ("extras", "parts"),
    [
        ({}, ["p", "l"]),
        ({"inputs": "i"}, ["p", "l", "i"]),
        ({"losses": "x"}, ["p", "l", "x"]),
        ({"losses": "x", "inputs": "i"}, ["p", "l", "i", "x"]),
    ],
)
def test_a_prediction_unpacks_as_what_it_holds(extras: dict[str, str], parts: list[str]) -> None:
    prediction = EvalPrediction("p", "l", **extras)

    assert list(prediction) == parts
    assert len(prediction) == len(parts)
    assert [prediction[i] for i in range(len(parts))] == parts
    assert (prediction.predictions, prediction.label_ids) == ("p", "l")
    assert (prediction.inputs, prediction.losses) == (extras.get("inputs"), extras.get("losses"))
    for index in (-1, len(parts)):
        with pytest.raises(IndexError, match=f"has {len(parts)} parts, asked for {index}"):
            prediction[index]


@pytest.mark.row(6)
def test_outputs_are_named_tuples() -> None:
    assert TrainOutput(3, 0.5, {})[:2] == (3, 0.5)
    assert TrainOutput._fields == ("global_step", "training_loss", "metrics")
    assert PredictionOutput._fields == ("predictions", "label_ids", "metrics")
    assert EvalLoopOutput._fields == ("predictions", "label_ids", "metrics", "num_samples")
