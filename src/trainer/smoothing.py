"""Label smoothing as a loss over logits, normalised once over a whole accumulation window."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from trainer import modeling


def _is_share(smoother: Any, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(
            f"LabelSmoother: epsilon must be between 0 and 1, got {value!r}. It is the share of the "
            "target that is spread over all classes; set label_smoothing_factor to 0.1, say."
        )


@frozen
class LabelSmoother:
    """Cross entropy against targets of which ``epsilon`` is spread evenly over all classes.

    With p = softmax(logits), V classes and A labels that count, the loss is

        (1 - epsilon) * sum(-log p[label]) / A + epsilon * sum(-log p over all classes) / (A * V)

    (Szegedy et al., 2016, "Rethinking the Inception Architecture"). Positions whose label is
    ``ignore_index`` count nowhere.

    Attributes:
        epsilon: between 0 and 1.
        ignore_index: the label of positions to leave out.
    """

    epsilon: float = field(default=0.1, validator=_is_share)
    ignore_index: int = -100

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of one micro-batch.

        Args:
            outputs: what the model returned: a mapping with ``"logits"``, a tuple that begins with
                them, or the logits (..., V) themselves, of any floating dtype.
            labels: class indices (...), or (..., 1).
            shift_labels: position i predicts the label of position i + 1, as in causal language models.
            num_items_in_batch: what to divide by in place of A: the labels that count (see ``count``)
                in all micro-batches of the window. The micro-batches' losses then add up to the loss of
                the window as one batch.

        Returns:
            A zero-dimensional tensor, of float32 at least. NaN if there is nothing to divide by.

        Raises:
            ValueError: if there are no logits, or the labels are not class indices for them.
        """
        logits = _logits(outputs)
        if labels.ndim == logits.ndim and labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
        _check_shapes(logits, labels)
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        # Sums of thousands of terms need more digits than half types have.
        wide = torch.promote_types(logits.dtype, torch.float32)
        costs = -logits.log_softmax(-1, dtype=wide)
        ignored = labels == self.ignore_index
        index = labels.masked_fill(ignored, 0).unsqueeze(-1).long()
        chosen = costs.gather(-1, index).squeeze(-1).masked_fill(ignored, 0.0)
        spread = costs.sum(-1).masked_fill(ignored, 0.0)
        items = (~ignored).sum() if num_items_in_batch is None else num_items_in_batch
        classes = logits.shape[-1]
        return (1 - self.epsilon) * (chosen.sum() / items) + self.epsilon * (
            spread.sum() / (items * classes)
        )

    def count(self, window: Sequence[Any], shift_labels: bool = False) -> Tensor | None:
        """Count the labels of a window of batches that the loss is summed over.

        With ``shift_labels`` the first label of every row is left out, because nothing predicts it.

        Returns:
            A zero-dimensional integer tensor where the labels are; None where there are none to count.
        """
        total: Tensor | None = None
        for batch in window:
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            if not isinstance(labels, Tensor):
                return None
            kept = (labels[..., 1:] if shift_labels else labels) != self.ignore_index
            total = kept.sum() if total is None else total + kept.sum()
        return total


def make_smoother(factor: float, model: nn.Module) -> LabelSmoother | None:
    """Return the smoother that ``label_smoothing_factor`` asks for; None for 0.

    For a model of several labels at once, which are not classes to spread anything over, there is none
    either, with a UserWarning.
    """
    config = getattr(modeling.without_adapters(model), "config", None)
    if factor and getattr(config, "problem_type", None) == "multi_label_classification":
        warnings.warn(
            f"label_smoothing_factor={factor} has no effect: the model's config.problem_type is "
            "multi_label_classification, whose labels are not classes that exclude each other",
            UserWarning,
            stacklevel=3,
        )
        return None
    return LabelSmoother(factor) if factor else None


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether a model is a causal language model, whose labels are its inputs.

    A class of transformers, or one that derives from it, is looked up among its causal language
    models; any other is judged by its name, which ends in ``ForCausalLM`` or ``LMHeadModel``.
    """
    kinds = type(modeling.without_adapters(model)).__mro__
    theirs = [kind for kind in kinds if kind.__module__.startswith("transformers.models.")]
    if not theirs:
        return kinds[0].__name__.endswith(("ForCausalLM", "LMHeadModel"))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return theirs[0].__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        logits, given = outputs.get("logits"), f"the keys {', '.join(outputs)}"
    else:
        logits = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
        given = f"a {type(outputs).__name__} without any"
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"label smoothing needs the model's logits, but it returned {given}. Return a mapping "
            'with "logits" or a tuple that begins with them, or set label_smoothing_factor=0.'
        )
    return logits


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            "label smoothing needs whole numbers of shape (...) as labels to logits of shape (..., "
            f"classes), got labels {tuple(labels.shape)} of {labels.dtype} and logits "
            f"{tuple(logits.shape)}. Only classification has "
            "classes to spread targets over; for anything else set label_smoothing_factor=0."
        )
