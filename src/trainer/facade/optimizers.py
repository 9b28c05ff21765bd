"""Optimizer and scheduler objects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer import modeling
from trainer.arguments import TrainingArguments
from trainer.facade.base import TrainerBase
from trainer.optimizers import (
    build_optimizer,
    decay_parameter_names,
    make_scheduler,
    optimizer_class_and_kwargs,
    parameter_groups,
)


class OptimizerMixin(TrainerBase):
    """Optimizer and scheduler objects."""

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
