"""Evaluation and prediction: every sample once, the loss weighted by samples, one concatenation."""

from trainer.evaluation.half import cast_inputs as cast_inputs
from trainer.evaluation.half import half_weights as half_weights
from trainer.evaluation.loop import Evaluation as Evaluation
from trainer.evaluation.prediction import predict_batch as predict_batch
