"""Stop training once a metric has ceased to improve."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .base import ExportableState, TrainerCallback
from .control import TrainerControl
from .flow import strategy_name
from .state import TrainerState

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stop after `early_stopping_patience` evaluations in a row without an improvement.

    An evaluation improves if its ``metric_for_best_model`` is better than ``state.best_metric`` by
    more than the threshold, or if there is no best metric yet. The Trainer updates the best metric
    after this callback ran.

    Args:
        early_stopping_patience: Evaluations without improvement that stop training.
        early_stopping_threshold: Difference that an improvement must exceed; None means 0.
    """

    def __init__(
        self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0
    ) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there is a metric to watch, and evaluations that give it.

        Raises:
            AssertionError: ``metric_for_best_model`` is None or ``eval_strategy`` is "no".
        """
        if args.metric_for_best_model is None:
            raise AssertionError(
                "EarlyStoppingCallback needs a metric_for_best_model to watch, got None; "
                'set for instance metric_for_best_model="loss"'
            )
        if strategy_name(args.eval_strategy) == "no":
            raise AssertionError(
                'EarlyStoppingCallback needs an eval_strategy of "steps" or "epoch", got "no"; '
                "without evaluations there is no metric"
            )
        if not args.load_best_model_at_end:
            logger.warning(
                "EarlyStoppingCallback is used without load_best_model_at_end=True: training ends "
                "with the last weights, not with the best ones."
            )
        # Resumed where it had stopped: without this another epoch would be trained.
        if state.global_step > 0 and self._exhausted:
            control.should_training_stop = True

    @property
    def _exhausted(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count this evaluation and stop training if patience is used up."""
        metrics = {} if metrics is None else metrics
        metric = args.metric_for_best_model
        if not metric.startswith("eval_"):
            metric = f"eval_{metric}"
        value = metrics.get(metric)
        if value is None:
            if not _is_of_another_set(metrics, metric):
                logger.warning(
                    "early stopping needs %r, which this evaluation did not report (it has: %s); "
                    "the evaluation is not counted.",
                    metric,
                    ", ".join(metrics),
                )
            return
        self.check_metric_value(args, state, control, value)
        if self._exhausted:
            control.should_training_stop = True

    def check_metric_value(
        self, args: Any, state: TrainerState, control: TrainerControl, metric_value: Any
    ) -> None:
        """Reset the counter if `metric_value` improves on the best metric, else raise it by one."""
        if state.best_metric is None:
            self.early_stopping_patience_counter = 0
            return
        gain = float(metric_value) - state.best_metric
        if not args.greater_is_better:
            gain = -gain
        # NaN compares false: it never improves.
        if gain > 0 and gain > (self.early_stopping_threshold or 0.0):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def state(self) -> dict[str, Any]:
        """Return patience, threshold and the counter in the form that a checkpoint stores."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


def _is_of_another_set(metrics: Mapping[str, Any], metric: str) -> bool:
    """Tell whether `metrics` are of a named evaluation set to which `metric` does not belong.

    With several evaluation sets this event comes once for each. A set called "news" reports
    "eval_news_runtime" where a single set reports "eval_runtime".
    """
    prefixes = [key.removesuffix("runtime") for key in metrics if key.endswith("_runtime")]
    return bool(prefixes) and not any(metric.startswith(prefix) for prefix in prefixes)
