"""What one batch gives: loss, outputs, labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer import modeling
from trainer.data.columns import LABELS
from trainer.evaluation.nested import detached


def predict_batch(
    trainer: Any, model: Any, inputs: Any, loss_only: bool, ignore_keys: list[str]
) -> tuple[Tensor | None, Any, Any]:
    """Compute ``(loss, logits, labels)`` of one prepared batch; see ``Trainer.prediction_step``."""
    names = trainer.label_names
    keyed = isinstance(inputs, Mapping)
    has_labels = bool(names) and keyed and all(inputs.get(n) is not None for n in names)
    returns_loss = keyed and inputs.get("return_loss", trainer.can_return_loss)
    labels = None
    if has_labels:
        values = detached(tuple(inputs[n] for n in names))
        labels = values[0] if len(values) == 1 else values
    # Not torch.inference_mode: what a module computes here and keeps for later (rotary tables, masks)
    # could then not be saved for a backward pass, so that training after an evaluation would fail.
    with torch.no_grad(), trainer.compute_loss_context_manager():
        if has_labels or (not names and returns_loss):
            items = trainer.count_items([inputs])
            loss, outputs = trainer._call_compute_loss(
                model, inputs, items=items, return_outputs=True
            )
            loss = loss.detach().mean()
        else:
            loss, outputs = None, model(**_taken(trainer, inputs)) if keyed else model(inputs)
    if loss_only:
        return loss, None, None
    return loss, detached(_logits(outputs, loss is not None, ignore_keys)), labels


def _taken(trainer: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the inputs without labels that ``forward`` does not take: they are there for a loss."""
    if not any(name in inputs for name in LABELS):
        return inputs
    names = modeling.forward_names(trainer.model)
    if modeling.takes_any(trainer.model):
        return inputs
    return {k: v for k, v in inputs.items() if k in names or k not in LABELS}


def _logits(outputs: Any, has_loss: bool, ignore_keys: list[str]) -> Any:
    if isinstance(outputs, Mapping):
        hidden = {*ignore_keys, "loss"} if has_loss else {*ignore_keys}
        logits: Any = tuple(v for k, v in outputs.items() if k not in hidden and v is not None)
    elif isinstance(outputs, list | tuple):
        logits = tuple(outputs[1:]) if has_loss else tuple(outputs)
    else:
        logits = () if has_loss else (outputs,)
    if not logits:
        return None
    return logits[0] if len(logits) == 1 else logits
