"""Records that training, evaluation and prediction hand out."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class TrainOutput(NamedTuple):
    """What ``Trainer.train`` returns.

    Attributes:
        global_step: updates done, over the whole run.
        training_loss: mean loss over the updates of this call.
        metrics: the final log record.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class PredictionOutput(NamedTuple):
    """What ``Trainer.predict`` returns: NumPy arrays (or nested tuples, dicts) and metrics."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None


class EvalLoopOutput(NamedTuple):
    """What ``Trainer.evaluation_loop`` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    num_samples: int | None


class EvalPrediction:
    """What ``compute_metrics`` receives; unpacks as predictions, labels, then inputs and losses if any.

    Args:
        predictions: the model's outputs, array or nested tuple of arrays.
        label_ids: the labels.
        inputs: the main inputs, if ``include_for_metrics`` has "inputs".
        losses: the loss of each batch, if ``include_for_metrics`` has "loss".
    """

    def __init__(
        self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None
    ) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        extras = tuple(part for part in (inputs, losses) if part is not None)
        self.elements = (predictions, label_ids, *extras)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self.elements):
            raise IndexError(f"EvalPrediction has {len(self.elements)} parts, asked for {index}")
        return self.elements[index]
