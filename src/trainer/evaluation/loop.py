"""The loop over the batches of an evaluation or prediction, and what comes out of it."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from trainer import modeling
from trainer.distributed import fsdp_plan
from trainer.distributed.gather import gathered
from trainer.engine import describe
from trainer.evaluation.collected import PADDING, Collected
from trainer.evaluation.nested import batch_length, plain_numbers, to_numpy
from trainer.metrics import with_prefix
from trainer.outputs import EvalLoopOutput, EvalPrediction
from trainer.plan import num_examples

logger = logging.getLogger(__name__)


@frozen(eq=False)
class Predicted:
    """What one batch gave.

    Attributes:
        size: samples in the batch.
        loss: their mean loss, on the device; None without labels.
        logits: outputs, after ``preprocess_logits_for_metrics``.
        labels: labels.
        inputs: the model's main input, if metrics want it.
        whole: all that the model was given, if the metrics of each batch want it.
    """

    size: int
    loss: Tensor | None
    logits: Any
    labels: Any
    inputs: Any
    whole: Any = None

    @property
    def losses(self) -> Tensor | None:
        """The mean loss once for every sample."""
        return None if self.loss is None else self.loss.repeat(self.size)


class Evaluation:
    """One pass of a model over a loader, without gradients.

    With ``batch_eval_metrics``, ``compute_metrics`` gets each batch's tensors as they are, and outputs are
    kept only for a prediction. With ``eval_use_gather_object``, outputs may be lists of one Python
    object per sample.

    Args:
        trainer: whose ``prediction_step`` is called, and ``compute_metrics``.
        model: what ``prediction_step`` is given.
        loss_only: keep nothing but losses.
        ignore_keys: outputs to leave out.
        prediction: outputs are wanted as such, and not only for metrics.
    """

    def __init__(
        self,
        trainer: Any,
        model: Any,
        loss_only: bool,
        ignore_keys: list[str] | None,
        *,
        prediction: bool,
    ) -> None:
        args = trainer.args
        self._trainer, self._model = trainer, model
        self._loss_only, self._ignore_keys = loss_only, ignore_keys
        self._prediction = prediction
        self._wanted = frozenset(args.include_for_metrics)
        self._by_batch = args.batch_eval_metrics and trainer.compute_metrics is not None
        self._means: list[Tensor] = []
        self._sizes: list[int] = []
        self._seen = 0
        self._keys: list[str] = []
        self._metrics: Any = None

        def collected(what: str, padding: int = PADDING) -> Collected:
            return Collected(
                what,
                args.eval_do_concat_batches,
                args.eval_accumulation_steps,
                padding,
                args.eval_use_gather_object,
            )

        padding = trainer._output_padding()
        self._outputs = collected("predictions", padding)
        self._labels = collected("labels", padding)
        self._inputs, self._losses = collected("inputs"), collected("losses")

    def run(self, loader: Iterable[Any]) -> None:
        """Run the model over all batches; with several processes, of all of them, in order."""
        ranks, every = self._trainer._ranks, self._trainer.args.eval_accumulation_steps
        if not ranks.many:
            for batch, last in with_last(loader):
                self._keep(self._predict(batch), last)
            return
        mine = self._outcomes(loader, ranks)
        for values, last in with_last(gathered(ranks, mine, 1 if self._by_batch else every)):
            self._keep(Predicted(*values), last)

    def _outcomes(self, loader: Iterable[Any], ranks: Any) -> Iterator[Any]:
        """Yield what this process's batches give; None for one that only others have."""
        zero = self._trainer._zero
        if not (fsdp_plan.wanted(self._trainer.args) or (zero is not None and zero.partitions)):
            for batch in loader:
                yield None if batch is None else attrs.astuple(self._predict(batch), recurse=False)
            return
        from trainer.distributed.fsdp_engine import evenly

        for batch, own in evenly(ranks, loader):  # weights are gathered by all processes at once
            if own:
                yield attrs.astuple(self._predict(batch), recurse=False)
            else:
                self._trainer.prediction_step(
                    self._model, batch, self._loss_only, ignore_keys=self._ignore_keys
                )
                yield None

    def result(self, loader: Any, prefix: str) -> EvalLoopOutput:
        """Return outputs and metrics, which are computed now unless they were batch by batch.

        The loss is the mean over samples: each batch's loss counts as often as the batch has samples,
        so it does not depend on how the last batch turns out. NumPy adds pairwise, which loses less
        than a running sum and gives the Hugging Face Trainer's bits.
        """
        predictions, labels = self._outputs.result(), self._labels.result()
        if not self._by_batch and self._trainer.compute_metrics is not None:
            if predictions is not None and labels is not None:
                parts = (predictions, labels, self._inputs.result(), self._losses.result())
                self._metrics = named(self._trainer.compute_metrics(EvalPrediction(*parts)))
            elif not self._loss_only and not self._prediction and self._seen:
                self._explain_missing("labels" if labels is None else "outputs besides the loss")
        metrics = plain_numbers(self._metrics or {})
        if self._seen and self._means:
            means = to_numpy(torch.stack(self._means))
            metrics[f"{prefix}_loss"] = np.repeat(means, self._sizes).mean().item()
        samples = num_examples(loader, self._trainer.args.eval_batch_size) or self._seen
        return EvalLoopOutput(predictions, labels, with_prefix(metrics, prefix), samples)

    def _keep(self, part: Predicted, last: bool) -> None:
        self._seen += part.size
        if part.loss is not None:
            self._means.append(part.loss)
            self._sizes.append(part.size)
        if self._by_batch and part.logits is not None and part.labels is not None:
            self._metrics = self._batch_metrics(part, last)
        if self._prediction or not self._by_batch:
            self._outputs.add(part.logits)
            self._labels.add(part.labels)
            self._inputs.add(part.inputs)
            self._losses.add(part.losses if "loss" in self._wanted else None)

    def _predict(self, batch: Any) -> Predicted:
        """Return what a batch gives."""
        trainer = self._trainer
        if isinstance(batch, Mapping) and not self._keys:
            self._keys = [str(key) for key in batch]
        try:
            loss, logits, labels = trainer.prediction_step(
                self._model, batch, self._loss_only, ignore_keys=self._ignore_keys
            )
        except Exception as error:
            takes = ", ".join(modeling.forward_names(trainer.model))
            error.add_note(
                f"while evaluating on the batch {describe(batch)}; the model's forward takes {takes}"
            )
            raise
        if logits is not None and trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        inputs = main_input(trainer.model, batch) if "inputs" in self._wanted else None
        loss = None if loss is None else loss.detach()
        whole = None
        if self._by_batch and "inputs" in self._wanted:
            whole = trainer._prepare_inputs(batch)
        trainer.control = trainer.callback_handler.on_prediction_step(
            trainer.args, trainer.state, trainer.control
        )
        return Predicted(batch_length(batch), loss, logits, labels, inputs, whole)

    def _batch_metrics(self, part: Predicted, last: bool) -> Any:
        losses = part.losses if "loss" in self._wanted else None
        metrics = self._trainer.compute_metrics(
            EvalPrediction(part.logits, part.labels, part.whole, losses), compute_result=last
        )
        return named(metrics) if last else None  # only the last result counts

    def _explain_missing(self, what: str) -> None:
        names = self._trainer.label_names
        logger.warning(
            "compute_metrics is not called, because there are no %s. The batches hold %s; labels are "
            "looked up under %s. Name the labels in label_names, or let the dataset or the collator "
            "supply them.",
            what,
            ", ".join(self._keys) or "no named values",
            ", ".join(names) or "no name",
        )


def named(metrics: Any) -> dict[str, Any]:
    """Return what ``compute_metrics`` returned as a dict.

    Raises:
        TypeError: if it is something else, or its keys are no strings.
    """
    if not isinstance(metrics, Mapping):
        hint = "; is there a return statement?" if metrics is None else ""
        raise TypeError(
            'compute_metrics must return a dict of names and values, such as {"accuracy": 0.9}, but '
            f"returned {_shown(metrics)}{hint}"
        )
    wrong = [key for key in metrics if not isinstance(key, str)]
    if wrong:
        raise TypeError(
            f"compute_metrics must return a dict whose keys are strings, but returned {wrong[0]!r} as "
            "a key"
        )
    return dict(metrics)


def _shown(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield every batch, and whether it is the last: one batch is read ahead to know."""
    iterator = iter(batches)
    for held in iterator:
        for following in iterator:
            yield held, False
            held = following
        yield held, True


def main_input(model: Any, batch: Any) -> Any:
    """Return the input that ``model.main_input_name`` names, ``input_ids`` by default."""
    name = getattr(model, "main_input_name", "input_ids")
    return batch.get(name) if isinstance(batch, Mapping) else None
