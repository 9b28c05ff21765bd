"""Optimizer and scheduler objects, and their pure form."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import trainstep as ts
from trainer import modeling
from trainer.arguments import TrainingArguments
from trainer.facade.base import TrainerBase
from trainer.optimizers import (
    Adopted,
    adopt,
    build_optimizer,
    carried,
    decay_parameter_names,
    make_scheduler,
    optimizer_class_and_kwargs,
    parameter_groups,
    refuse_scaling,
)

logger = logging.getLogger(__name__)


class OptimizerMixin(TrainerBase):
    """Optimizer and scheduler objects, and their pure form."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Create the optimizer and the scheduler for a run of so many updates."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create ``self.optimizer``, unless there is one.

        It has a decayed and an undecayed group, if the options do not bring groups of their own.
        """
        if self.optimizer is None:
            model = modeling.unwrap(self.model if model is None else model)
            cls, kwargs = self.optimizer_cls_and_kwargs or self._named_optimizer(model)

            def groups() -> list[dict[str, Any]]:
                decayed = set(self.get_decay_parameter_names(model))
                return parameter_groups(model, decayed, self.args.weight_decay)

            self.optimizer = build_optimizer(cls, kwargs, model, groups)
            self._made = self.optimizer, self._made[1]
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create ``self.lr_scheduler``, unless there is one."""
        if self.lr_scheduler is None:
            args = self.args
            self.lr_scheduler = make_scheduler(
                str(args.lr_scheduler_type),
                optimizer or self.create_optimizer(),
                args.get_warmup_steps(num_training_steps),
                num_training_steps,
                dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
            )
            self._made = self._made[0], self.lr_scheduler
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the class that ``args.optim`` names, and its options.

        Options named ``params`` or ``model`` are to replace the usual parameter groups.

        Raises:
            ValueError: for options that the class does not take, and for a missing model where the class
                is built over it.
            ImportError: naming the package that has to be installed.
        """
        return optimizer_class_and_kwargs(args, model)

    def get_learning_rates(self) -> list[float]:
        """Return the learning rate of every parameter group.

        Raises:
            ValueError: before there is an optimizer.
        """
        return [group["lr"] for group in self._existing_optimizer().param_groups]

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """Return the group that holds a parameter (or the one of that name); without one, the
        parameter lists of all groups.

        Raises:
            ValueError: before there is an optimizer.
        """
        groups = self._existing_optimizer().param_groups
        if param is None:
            return [group["params"] for group in groups]
        if isinstance(param, str):
            param = dict(modeling.unwrap(self.model).named_parameters()).get(param)
        return next((g for g in groups if any(p is param for p in g["params"])), None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return decay_parameter_names(modeling.unwrap(model))

    def get_num_trainable_parameters(self) -> int:
        """Count the numbers in parameters with ``requires_grad``, those on other processes included."""
        return sum(modeling.numel(p) for p in self.model.parameters() if p.requires_grad)

    def _existing_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ValueError("the optimizer does not exist yet: call train() or create_optimizer()")
        return self.optimizer

    def _named_optimizer(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        if "warmup_steps" in kwargs and self.state.max_steps > 0:
            # A share of the run: its length is known only now.
            kwargs = {**kwargs, "warmup_steps": self.args.get_warmup_steps(self.state.max_steps)}
        return cls, kwargs

    def _switch_optimizer(self, mode: str) -> None:
        # Schedule-free optimizers keep other weights for evaluation than for training.
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    @property
    def _two_sets_of_weights(self) -> bool:
        """Whether the optimizer evaluates with other weights than it trains."""
        return all(callable(getattr(self.optimizer, mode, None)) for mode in ("train", "eval"))

    @contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        """Give the model the weights that the optimizer evaluates with.

        During training it has its own back afterwards, to the last bit: switching there and back would
        round them. Outside of training it keeps those for evaluation.
        """
        if not self._two_sets_of_weights or not self.is_in_train:
            self._switch_optimizer("eval")
            yield
            return
        groups = self._existing_optimizer().param_groups
        parameters = [p for group in groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters]
        self._switch_optimizer("eval")
        try:
            yield
        finally:
            self._switch_optimizer("train")
            with torch.no_grad():
                for parameter, own in zip(parameters, kept, strict=True):
                    parameter.copy_(own)

    @contextmanager
    def _updating(self, run: Any) -> Iterator[None]:
        """The block in which ``run`` trains: updates made in the backward pass happen inside it only.

        At its end the model has the weights that are to be evaluated and saved.
        """
        if self._zero is not None:  # the engine has the only weights
            from trainer.distributed import deepspeed_contexts

            with deepspeed_contexts.updating(self):
                yield
            return
        adopted = self._adopt_optimizer()
        self._switch_optimizer("train")
        with adopted.updating():
            yield
        if self._two_sets_of_weights:
            self._switch_optimizer("eval")
            run.state = run.state.evolve(opt_state=adopted.current(run.state.opt_state))

    @property
    def _own_scheduler(self) -> bool:
        """Whether there is no scheduler, or one that the Trainer made: each run has one of its length."""
        return self.lr_scheduler is None or self.lr_scheduler is self._made[1]

    def _create_missing(self, updates: int) -> None:
        """Create optimizer and scheduler, unless there are some; notes what overrides have made, too."""
        missing = self.optimizer is None, self.lr_scheduler is None
        self.create_optimizer_and_scheduler(num_training_steps=updates)
        now = self.optimizer, self.lr_scheduler
        made = zip(missing, now, self._made, strict=True)
        optimizer, scheduler = (mine if new else before for new, mine, before in made)
        self._made = optimizer, scheduler

    def _renew_optimizer(self) -> None:
        """Make the Trainer's own optimizer anew if it lacks parameters that are trainable by now.

        Moments of the parameters that it had are kept where the core's kernels do the work.
        """
        before, state, own = self._adopted, self._train_state, self._made[0]
        if before is None or before.object is not self.optimizer or self.optimizer is not own:
            return
        if self.lr_scheduler is not None or not before.lacks(self._trainable()):
            return  # a scheduler of the user's drives this one
        logger.info(
            "Other parameters are trainable than in the training before: a new %s is made over them.",
            type(own).__name__,
        )
        self.optimizer = None
        self._made = self.create_optimizer(), self._made[1]  # by an override, perhaps
        if self._adopt_optimizer().translated and before.translated and state is not None:
            self._train_state = self._over_new_parameters(state)

    def _adopt_optimizer(self) -> Adopted:
        """Return the pure form of ``self.optimizer``, made once for an object and what it trains.

        Moments are kept for the same object only; another one brings its own.
        """
        optimizer = self.create_optimizer() if self.optimizer is None else self.optimizer
        names, before = self._trainable(), self._adopted
        if before is not None and before.fits(optimizer, names):
            return before
        same = before if before is not None and before.object is optimizer else None
        if same is not None and same.translated:
            optimizer.state.clear()  # shown tensors of the train state, which has them
        self._adopted = adopt(optimizer, names)
        if self._adopted.fused is not None:
            refuse_scaling(self.args, type(optimizer).__name__)
        if before is not None and (state := self._train_state) is not None:
            self._train_state = None if same is None else self._over_new_parameters(state)
        if missing := self._adopted.lacks(names):
            logger.warning(
                "%s does not hold %s: they are trainable, and are not trained. Freeze them "
                "(requires_grad=False), or give them to the optimizer.",
                type(optimizer).__name__,
                ", ".join(missing),
            )
        return self._adopted

    def _trainable(self) -> dict[torch.Tensor, str]:
        """Return the names of the parameters that are not frozen."""
        named = modeling.unwrap(self.model).named_parameters()
        return {p: n for n, p in named if p.requires_grad}

    def _over_new_parameters(self, state: ts.TrainState) -> ts.TrainState:
        """Return a state over the parameters that are trainable now, with the moments of ``state``."""
        adopted = self._adopt_optimizer()
        model = modeling.unwrap(self.model)
        fresh = ts.init(model, adopted.pure, self.args.seed, copy=False)
        moments = fresh.opt_state  # an object that runs itself has kept them
        if adopted.translated:
            moments = carried(moments, state.opt_state)
        return state.evolve(params=fresh.params, buffers=fresh.buffers, opt_state=moments)

    def _fresh_state(self, step: ts.Step | None) -> ts.TrainState:
        if self._zero is not None:
            from trainer.distributed import deepspeed_engine

            return deepspeed_engine.state_of(self)
        model, pure = modeling.unwrap(self.model), self._adopt_optimizer().pure
        if step is None:
            return ts.init(model, pure, self.args.seed, copy=False)
        fresh = step.init(model, self.args.seed, copy=False)
        if self._train_state is None:
            return fresh
        # A second train() goes on with the moments, and starts the schedule anew.
        return fresh.evolve(opt_state=self._train_state.opt_state)
