"""The learning rates and other options of an optimizer object's groups, whoever decides them."""

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.metrics import missing_metric
from trainer.optimizers.options import Options
from trainer.optimizers.schedulers import GreedyLR, rate_function, set_rate

logger = logging.getLogger(__name__)


@define(eq=False)
class Rates:
    """Rates and other options as hyperparameters of the pure step: those that ``param_groups`` have.

    Whoever writes there, a scheduler or a callback, is heard by the next update. A scheduler that is a
    function of the step is computed, never stepped, so resuming needs no state of it. Any other is stepped
    after every update (with a metric, after every evaluation), and its state is saved.

    Attributes:
        optimizer: the torch optimizer.
        scheduler: of whoever's rates; one that was built over another optimizer moves that one's.
        options: of the groups, besides the rates; see ``Adopted``.
        named: gives the model's parameters with their names, for messages.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any
    options: tuple[Options, ...] = ()
    named: Callable[[], Iterable[tuple[str, Tensor]]] = tuple
    _function: Callable[[int], list[float]] | None = field(init=False)
    _built: list[float] = field(init=False)
    _told: set[str] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self._function = rate_function(self.scheduler)
        if self._function is not None and self.scheduler.last_epoch != 0:
            self.show(0)  # the scheduler has been through another training
        self._built = [float(group["lr"]) for group in self.optimizer.param_groups]

    def check(self) -> None:
        """Warn of a scheduler that moves another optimizer's rates."""
        if self._foreign:
            logger.warning(
                "%s was built over another optimizer than the one that trains, whose rates stay as they "
                "are. Give the Trainer both: optimizers=(optimizer, scheduler).",
                type(self.scheduler).__name__,
            )

    @property
    def metric_driven(self) -> bool:
        """Whether evaluations, not updates, move the scheduler."""
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        return isinstance(self.scheduler, plateau | GreedyLR)

    def at(self, step: int) -> dict[str, float]:
        """Return the hyperparameters of the next update, number ``step`` (from 0).

        These are a rate, and those of groups that have another; and what else is not as it was built.
        """
        groups = self._groups()
        rates = [float(group["lr"]) for group in groups]
        first = rates[0]
        others = {f"group{i}/lr": rate for i, rate in enumerate(rates) if rate != first}
        hyper = {"lr": first, **others}
        for options, group in zip(self.options, groups, strict=False):  # none, or those of all
            if options.read(group) != options.built:
                hyper |= self._changed(options, group)
        return hyper

    def show(self, step: int) -> None:
        """Put the rates that follow ``step`` updates where scripts look for them."""
        if self._function is None:
            return
        rates = self._function(step)
        for group, rate in zip(self._driven, rates, strict=True):
            set_rate(group, rate)
        self.scheduler.last_epoch = step
        self.scheduler._last_lr = rates

    def advance(self, step: int) -> None:
        """Move on after an update; ``step`` counts them, this one included."""
        self._groups()
        if self._function is not None:
            self.show(step)
        elif self.scheduler is not None and not self.metric_driven:
            # Schedulers warn if their object has not stepped; its update was made without it.
            driven: Any = getattr(self.scheduler, "optimizer", self.optimizer)
            driven._opt_called = True
            self.scheduler.step()

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups.

        Raises:
            ValueError: if there are others than when training began.
        """
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        if len(groups) == len(self._built):
            return groups
        added = {id(p) for group in groups[len(self._built) :] for p in group["params"]}
        names = [name for name, p in self.named() if id(p) in added]
        raise ValueError(
            f"{type(self.optimizer).__name__} has {len(groups)} parameter groups and had "
            f"{len(self._built)} when training began; added: {', '.join(names) or 'none of the model'}. "
            "A training cannot take up groups on its way: give the optimizer all of them before train() "
            "and freeze in on_train_begin what is to wait, or call train() again after adding them."
        )

    @property
    def _foreign(self) -> bool:
        """Whether the scheduler was built over another optimizer, not over this or what this wraps."""
        if getattr(self.scheduler, "optimizer", self.optimizer) is self.optimizer:
            return False
        mine = {id(group) for group in self.optimizer.param_groups}
        return not any(id(group) in mine for group in self._driven)

    @property
    def _driven(self) -> list[dict[str, Any]]:
        """The groups that the scheduler moves."""
        optimizer = getattr(self.scheduler, "optimizer", self.optimizer)
        groups: list[dict[str, Any]] = optimizer.param_groups
        return groups

    def _changed(self, options: Options, group: dict[str, Any]) -> dict[str, float]:
        """Return the hyperparameters that are not as built; warn once of what has no effect."""
        for name, value in options.changed(group).items():
            if name in options.fixed and name not in self._told:
                self._told.add(name)
                logger.warning(
                    "%s: %s was set to %r during training. This option is built in when training "
                    "begins: it has no effect until another train().",
                    type(self.optimizer).__name__,
                    name,
                    value,
                )
        return options.hyper(group)

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

    def written(self) -> list[dict[str, Any]]:
        """Return what has to be saved besides, by group: what was written there and is not as built."""
        groups = self.optimizer.param_groups
        kept: list[dict[str, Any]] = [{} for _ in groups]
        for values, options, group in zip(kept, self.options, groups, strict=False):
            values |= options.kept(group)
        for values, group, rate in zip(kept, groups, self._scheduled(), strict=False):
            if (now := float(group["lr"])) != rate:
                values["lr"] = now
        return kept if any(kept) else []

    def restore(
        self,
        kept: dict[str, Any] | None,
        step: int,
        written: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Take up what ``state`` and ``written`` returned at step ``step``."""
        if self._function is not None:
            self.show(step)
        elif kept is not None:
            self.scheduler.load_state_dict(kept)
            for group, rate in zip(self._driven, self.scheduler.get_last_lr(), strict=True):
                set_rate(group, rate)
        for group, values in zip(self.optimizer.param_groups, written, strict=False):
            for name, value in values.items():
                if name == "lr":
                    set_rate(group, value)
                else:
                    group[name] = tuple(value) if isinstance(value, list) else value

    def _scheduled(self) -> list[float]:
        """Return the rates that the groups have if nobody but the scheduler writes there."""
        if self.scheduler is None or self._foreign:
            return self._built
        last: list[Any] = getattr(self.scheduler, "get_last_lr", list)()
        return [float(rate) for rate in last]
