"""The learning rates of an optimizer object's groups, whoever decides them."""

import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field

from trainer.metrics import missing_metric
from trainer.optimizers.schedulers import GreedyLR, rate_function, set_rate

logger = logging.getLogger(__name__)


@define(eq=False)
class Rates:
    """Rates as hyperparameters of the pure step, and as scripts see them in ``param_groups``.

    A scheduler that is a function of the step is computed, never stepped, so resuming needs no state of
    it. Any other is stepped after every update (with a metric, after every evaluation), and its state
    is saved.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any
    _function: Callable[[int], list[float]] | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._function = rate_function(self.scheduler)

    @property
    def metric_driven(self) -> bool:
        """Whether evaluations, not updates, move the scheduler."""
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        return isinstance(self.scheduler, plateau | GreedyLR)

    def at(self, step: int) -> dict[str, float]:
        """Return the hyperparameters of update number ``step`` (from 0): a rate, and those of groups."""
        groups = self.optimizer.param_groups
        rates = self._function(step) if self._function else [float(group["lr"]) for group in groups]
        first = rates[0]
        others = {f"group{i}/lr": rate for i, rate in enumerate(rates) if rate != first}
        return {"lr": first, **others}

    def show(self, step: int) -> None:
        """Put the rates that follow ``step`` updates where scripts look for them."""
        if self._function is None:
            return
        rates = self._function(step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, rate)
        self.scheduler.last_epoch = step
        self.scheduler._last_lr = rates

    def advance(self, step: int) -> None:
        """Move on after an update; ``step`` counts them, this one included."""
        if self._function is not None:
            self.show(step)
        elif self.scheduler is not None and not self.metric_driven:
            # Schedulers warn if the object has not stepped; its update was made without it.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            self.scheduler.step()

    def take_metric(self, args: Any, metrics: dict[str, float]) -> None:
        """Let a metric-driven scheduler see an evaluation.

        Raises:
            KeyError: if the metric is not among those evaluated.
        """
        if not self.metric_driven:
            return
        name = args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise KeyError(
                f"{type(self.scheduler).__name__} needs metric_for_best_model: "
                f"{missing_metric(name, metrics)}"
            )
        self.scheduler.step(metrics[name])

    def state(self) -> dict[str, Any] | None:
        """Return what has to be saved to resume the scheduler; None if it has no state of its own."""
        if self.scheduler is None or self._function is not None:
            return None
        kept = self.scheduler.state_dict()
        try:
            plain: dict[str, Any] = json.loads(json.dumps(kept))
            return plain
        except TypeError as error:
            logger.warning(
                "The state of %s cannot be saved (%s): a resumed run starts it anew.",
                type(self.scheduler).__name__,
                error,
            )
            return None

    def restore(self, kept: dict[str, Any] | None, step: int) -> None:
        """Take up what ``state`` returned at step ``step``."""
        if self._function is not None:
            self.show(step)
        elif kept is not None:
            self.scheduler.load_state_dict(kept)
            for group, rate in zip(
                self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
            ):
                set_rate(group, rate)
