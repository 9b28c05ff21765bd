"""Losses out of what models return."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def loss_from_outputs(outputs: Any, inputs: Any) -> Tensor:
    """Return the loss of a model's outputs: ``outputs["loss"]``, the first of a tuple, or the tensor.

    Raises:
        ValueError: if there is none, listing the keys of outputs and inputs.
    """
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
        if loss is None:
            given = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                "the model did not return a loss. Its outputs have the keys "
                f"{', '.join(outputs)}; its inputs had {given}. Most models compute a loss only if "
                "the batch holds labels: check the dataset's columns and the collator, or override "
                "compute_loss."
            )
    else:
        loss = outputs[0] if isinstance(outputs, list | tuple) else outputs
    if not isinstance(loss, Tensor) or loss.ndim:
        form = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the model's loss must be a zero-dimensional tensor, got {form}. Reduce it with "
            ".mean() in the model, or override compute_loss."
        )
    return loss


def count_label_items(window: list[Any]) -> Tensor | None:
    """Count the labels other than -100 in a window of batches; None where there are none to count."""
    if not window or not isinstance(window[0], Mapping) or "labels" not in window[0]:
        return None
    try:
        counts = [(batch["labels"] != -100).sum() for batch in window]
    except (TypeError, AttributeError):
        return None
    return sum(counts[1:], counts[0])
