"""Evaluation and prediction: every sample once, the loss weighted by samples, one concatenation."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from trainer.metrics import with_prefix
from trainer.outputs import EvalLoopOutput, EvalPrediction
from trainer.plan import length_of, num_examples

PADDING = -100


@define(eq=False)
class Collected:
    """The outputs of all batches, kept as a list and joined once at the end.

    Attributes:
        concatenate: join along the first axis; False keeps one entry per batch.
        every: move what has been collected to the host after that many batches; None at the end.
    """

    concatenate: bool
    every: int | None
    _parts: list[Any] = field(factory=list, init=False)
    _on_host: int = field(default=0, init=False)

    def add(self, value: Any) -> None:
        """Append a batch's outputs; None is ignored."""
        if value is None:
            return
        self._parts.append(detached(value))
        if self.every and len(self._parts) - self._on_host >= self.every:
            self._to_host()

    def result(self) -> Any:
        """Return NumPy arrays in the structure of a batch's outputs; None if nothing was added."""
        self._to_host()
        if not self._parts:
            return None
        return join(self._parts) if self.concatenate else self._parts

    def _to_host(self) -> None:
        for i in range(self._on_host, len(self._parts)):
            self._parts[i] = to_numpy(self._parts[i])
        self._on_host = len(self._parts)


def run_evaluation(
    trainer: Any,
    loader: Iterable[Any],
    prediction_loss_only: bool,
    ignore_keys: list[str] | None,
    prefix: str,
    *,
    keep: bool = True,
) -> EvalLoopOutput:
    """Run the model over a loader without gradients; see ``Trainer.evaluation_loop``.

    With ``batch_eval_metrics``, ``compute_metrics`` gets each batch's tensors as they are, and outputs are
    kept only if ``keep``.

    The loss is the mean over samples: each batch's loss counts as often as the batch has samples, so
    it does not depend on how the last batch turns out. NumPy adds pairwise, which loses less than a
    running sum and gives the Hugging Face Trainer's bits.
    """
    args = trainer.args
    outputs, labels, inputs, losses = (
        Collected(args.eval_do_concat_batches, args.eval_accumulation_steps) for _ in range(4)
    )
    wanted = set(args.include_for_metrics)
    by_batch = args.batch_eval_metrics and trainer.compute_metrics is not None
    keep = keep or not by_batch
    metrics: dict[str, Any] = {}
    means: list[Tensor] = []
    sizes: list[int] = []
    seen, last = 0, (length_of(loader) or 0) - 1
    for number, batch in enumerate(loader):
        size = batch_length(batch)
        seen += size
        loss, logits, target = trainer.prediction_step(
            trainer.model, batch, prediction_loss_only, ignore_keys=ignore_keys
        )
        if loss is not None:
            loss = loss.detach()
            means.append(loss)
            sizes.append(size)
            if "loss" in wanted:
                losses.add(loss.repeat(size))
        if logits is not None and trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, target)
        trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
        if by_batch and logits is not None and target is not None:
            given = trainer._prepare_inputs(batch) if "inputs" in wanted else None
            each = loss.repeat(size) if loss is not None and "loss" in wanted else None
            metrics = trainer.compute_metrics(
                EvalPrediction(logits, target, given, each), compute_result=number == last
            )
        if keep:
            outputs.add(logits)
            labels.add(target)
            inputs.add(_main_input(trainer, batch) if "inputs" in wanted else None)
    predictions, label_ids = outputs.result(), labels.result()
    complete = predictions is not None and label_ids is not None
    if complete and not by_batch and trainer.compute_metrics is not None:
        parts = (predictions, label_ids, inputs.result(), losses.result())
        metrics = trainer.compute_metrics(EvalPrediction(*parts))
    metrics = plain_numbers(dict(metrics or {}))
    if seen and means:
        metrics[f"{prefix}_loss"] = np.repeat(to_numpy(torch.stack(means)), sizes).mean().item()
    samples = num_examples(loader, args.eval_batch_size) or seen
    return EvalLoopOutput(predictions, label_ids, with_prefix(metrics, prefix), samples)


def batch_length(batch: Any) -> int:
    """Return the samples in a batch: the leading axis of its first tensor; 0 if it has none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, Iterable) and not isinstance(values, str | bytes):
        for value in values:
            if size := batch_length(value):
                return size
    return 0


def join(parts: list[Any]) -> Any:
    """Concatenate nested arrays along the first axis, padding the second with -100 to the longest.

    Raises:
        TypeError: if the batches have different structures or leaves that are no arrays.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        kinds = sorted({type(part).__name__ for part in parts})
        raise TypeError(f"batches have outputs of different types: {', '.join(kinds)}")
    if isinstance(first, list | tuple):
        joined = [join(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if not isinstance(first, np.ndarray):
        raise TypeError(f"cannot join outputs of type {type(first).__name__}; expected tensors")
    arrays = [np.atleast_1d(part) for part in parts]
    if arrays[0].ndim > 1:
        width = max(array.shape[1] for array in arrays)
        arrays = [_pad(array, width) for array in arrays]
    return np.concatenate(arrays, axis=0)


def to_numpy(value: Any) -> Any:
    """Return nested tensors as NumPy arrays; bfloat16, which NumPy lacks, as float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return _nested(to_numpy, value)


def detached(value: Any) -> Any:
    """Return nested tensors detached from their graph."""
    return value.detach() if isinstance(value, Tensor) else _nested(detached, value)


def plain_numbers(value: Any) -> Any:
    """Turn NumPy scalars and one-element arrays and tensors into Python numbers, recursively."""
    if isinstance(value, Mapping):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_numbers(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | Tensor):
        if (value.size if isinstance(value, np.ndarray) else value.numel()) == 1:
            return value.item()
        return value.tolist()
    return value


def _nested(fn: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: fn(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        parts = [fn(item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _pad(array: Any, width: int) -> Any:
    if array.shape[1] == width:
        return array
    padded = np.full((array.shape[0], width, *array.shape[2:]), PADDING, dtype=array.dtype)
    padded[:, : array.shape[1]] = array
    return padded


def _main_input(trainer: Any, batch: Any) -> Any:
    name = getattr(trainer.model, "main_input_name", "input_ids")
    return batch.get(name) if isinstance(batch, Mapping) else None


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
    with torch.no_grad(), trainer.compute_loss_context_manager():
        if has_labels or (not names and returns_loss):
            items = trainer.count_items([inputs])
            loss, outputs = trainer._call_compute_loss(
                model, inputs, items=items, return_outputs=True
            )
            loss = loss.detach().mean()
        else:
            loss, outputs = None, model(**inputs) if keyed else model(inputs)
    if loss_only:
        return loss, None, None
    return loss, detached(_logits(outputs, loss is not None, ignore_keys)), labels


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
