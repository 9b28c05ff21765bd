"""What the pure step has of optimizer and scheduler objects: made, renewed, adopted, for each training."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import trainstep as ts
from trainer import modeling
from trainer.checks import check_optimizers
from trainer.distributed import deepspeed_plan, fsdp_plan
from trainer.facade.base import TrainerBase
from trainer.optimization import check_choices
from trainer.optimizers import Adopted, adopt, carried, refuse_scaling
from trainer.support import refuse_unsupported, refuse_unused_hooks

logger = logging.getLogger(__name__)


class AdoptionMixin(TrainerBase):
    """The pure form of the optimizer object, and the state that goes with it."""

    def _plan_distribution(
        self,
        optimizers: tuple[torch.optim.Optimizer | None, Any],
        cls_and_kwargs: tuple[Any, dict[str, Any]] | None,
        model_init: Callable[[], nn.Module] | None,
    ) -> None:
        """Decide who holds and updates what, and refuse what would have no effect or cannot be."""
        fsdp_plan.check(self.args, optimizers)
        zero = self._zero = deepspeed_plan.plan(self.args, optimizers, cls_and_kwargs)
        refuse_unsupported(self.args)
        refuse_unused_hooks(self)
        check_optimizers(optimizers, cls_and_kwargs, model_init)
        own_optimizer, own_scheduler = optimizers[0] is None, optimizers[1] is None
        check_choices(
            self.args,
            optimizer=own_optimizer
            and cls_and_kwargs is None
            and not (zero and zero.own_optimizer),
            scheduler=own_scheduler and not (zero and zero.own_scheduler),
        )

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
