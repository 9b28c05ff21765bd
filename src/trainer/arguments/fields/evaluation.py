"""Fields on evaluation and prediction."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass

from ..enums import IntervalStrategy
from .option import option


@dataclass(repr=False)
class EvaluationFields:
    """When to evaluate, on what batches, and which outputs to keep."""

    eval_strategy: IntervalStrategy | str = option(
        "no", "When to evaluate during training. Anything but no requires an evaluation dataset."
    )
    eval_steps: float | None = option(
        None,
        "Updates between two evaluations, by default logging_steps; below 1 a fraction of all updates.",
    )
    eval_delay: float = option(
        0, "Steps or epochs (by eval_strategy) before which nothing is evaluated."
    )
    per_device_eval_batch_size: int = option(
        8, "Rows that each device sees at once in evaluation and prediction."
    )
    prediction_loss_only: bool = option(
        False, "Keep only the loss of evaluation and prediction, not the outputs."
    )
    eval_on_start: bool = option(False, "Evaluate once before the first update.")
    eval_do_concat_batches: bool = option(
        True, "Join the outputs of all batches into arrays. False keeps one list entry a batch."
    )
    eval_use_gather_object: bool = option(
        False, "Gather nested Python objects, not only tensors, from all processes."
    )
    eval_accumulation_steps: int | None = option(
        None, "Move collected outputs to the CPU every so many prediction steps. None: at the end."
    )
    include_for_metrics: list[str] = option(
        help="What compute_metrics receives besides predictions and labels: inputs, loss.",
        factory=list,
        choices=("inputs", "loss"),
    )
    batch_eval_metrics: bool = option(
        False, "Call compute_metrics after each batch; its compute_result is True on the last one."
    )
    metric_for_best_model: str | None = option(
        None,
        "Metric that tells the best checkpoint, with or without 'eval_'. It is the loss if the best "
        "model is loaded at the end or the schedule follows a metric.",
    )
    greater_is_better: bool | None = option(
        None, "Whether that metric is to be maximised. None: unless its name ends in 'loss'."
    )
    do_eval: bool = option(
        False, "For scripts: whether to evaluate. True if eval_strategy is not no."
    )
    do_predict: bool = option(
        False, "For scripts: whether to predict. The Trainer does not read it."
    )
