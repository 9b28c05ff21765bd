"""Gradients and updates by DeepSpeed's engine, which owns the optimizer, its state and the master weights.

A run with DeepSpeed has an update of its own in place of the pure step: clipping, loss scale and optimizer
are the engine's. ``train_state`` has the step, the key, the buffers and the parameters as this process
holds them (with stage 3 its flat parts); ``opt_state`` is empty, because the moments are the engine's.
"""

import logging
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

import trainstep as ts
from trainer import modeling
from trainer.arguments import deepspeed as configuration
from trainer.distributed.deepspeed_contexts import as_launched, drop, dtype_of
from trainer.distributed.deepspeed_plan import Zero, library
from trainer.distributed.fsdp_engine import FSDPEngine
from trainer.engine import no_loss
from trainer.optimizers import Rates, parameter_groups
from trainstep import TrainState
from trainstep.types import Buffers, Grads, Metrics

logger = logging.getLogger(__name__)


class DeepSpeedEngine(FSDPEngine):
    """Lets every micro-batch add to the engine's gradients, and tells it which is the last of an update.

    The loss is divided by the micro-batches of the update, as always, and not by the engine, which would
    take the number from its configuration although the last update of an epoch may have fewer.
    """

    def _announce(self, *, last: bool) -> None:
        self._trainer._zero.engine.set_gradient_accumulation_boundary(last)

    def collect(self) -> Grads:
        """Return nothing: gradients are the engine's."""
        return {}

    def drop(self) -> None:
        """Leave the engine its gradients."""


@frozen(eq=False)
class DeepSpeedStep:
    """Finishes an update whose gradients the engine has; what ``Run.step`` is with DeepSpeed."""

    trainer: Any
    _keys: ts.Step

    @property
    def skips(self) -> bool:
        """Whether buffers are to be put back after an update that was refused: not here."""
        return False

    def loss_key(self, state: TrainState) -> ts.Key:
        """Return the key of this step's loss, the same as without DeepSpeed."""
        return self._keys.loss_key(state)

    def loss_scale(self, state: TrainState) -> None:
        """Return None: the engine scales the loss itself."""

    def prepare(self, state: TrainState, loss: ts.Loss, grads: Grads) -> ts.Loss:
        """Do nothing yet: the engine clips and updates at once."""
        return loss

    def finish(self, state: TrainState, loss: ts.Loss) -> tuple[TrainState, Metrics]:
        """Let the engine update, and return the state after it with the metrics."""
        engine, rates = self.trainer._zero.engine, self.trainer._rates
        lr = rates.at(state.step)["lr"]
        engine.step()
        # A tensor, but after an overflow of float16 a number; None if that was the first update.
        norm = engine.get_global_grad_norm()
        norm = float("nan") if norm is None else norm
        metrics = {
            "loss": loss.value,
            "grad_norm": torch.as_tensor(norm, dtype=torch.float32, device=loss.value.device),
            "weight": torch.as_tensor(loss.weight),
            "lr": torch.as_tensor(lr, dtype=torch.float64),
        }
        buffers = state.buffers if loss.buffers is None else loss.buffers
        return state.evolve(step=state.step + 1, buffers=buffers), metrics


class EngineRates(Rates):
    """The rates of a schedule that the engine moves, saves and restores."""

    def advance(self, step: int) -> None:
        """Do nothing: the engine has moved on in its update."""

    def state(self) -> None:
        """Return None: the state is in the engine's checkpoint."""

    def restore(self, kept: dict[str, Any] | None, step: int, written: Any = ()) -> None:
        """Do nothing: the engine has restored it."""


def begin(trainer: Any, updates: int) -> tuple[DeepSpeedStep, TrainState, Rates]:
    """Build the engine, unless an earlier training has, and what a run is made of.

    Optimizer and schedule come from the configuration if it names them, else from the trainer.

    Raises:
        ValueError: for a configuration that does not fit the model or the length of the run; for a second
            training with a schedule that belongs to the engine, which is at its end.
    """
    zero: Zero = trainer._zero
    if zero.engine is not None and not zero.trains:
        drop(zero)
    if zero.engine is None:
        _build(trainer, zero, updates)
    elif zero.own_scheduler:
        raise ValueError(
            "deepspeed: the schedule of the configuration is at its end after the first training, and "
            "DeepSpeed cannot begin it anew; make another Trainer, or leave scheduler out of it."
        )
    elif trainer.lr_scheduler is None:
        trainer.lr_scheduler = trainer.create_scheduler(updates, trainer.optimizer)
    kind = EngineRates if zero.own_scheduler else Rates
    keys = ts.make_step(no_loss, ts.optim.sgd())
    rates = kind(trainer.optimizer, trainer.lr_scheduler)
    return DeepSpeedStep(trainer, keys), state_of(trainer), rates


def state_of(trainer: Any) -> TrainState:
    """Return the state before the first update; its tensors are the module's, or those parts held here."""
    module = modeling.unwrap(trainer.model)
    params = {n: _held(p) for n, p in module.named_parameters() if p.requires_grad}
    buffers: Buffers = dict(module.named_buffers())
    return TrainState(0, params, buffers, (), ts.rng.key(trainer.args.seed))


def _build(trainer: Any, zero: Zero, updates: int) -> None:
    args, model = trainer.args, modeling.unwrap(trainer.model)
    config = configuration.finished(args, zero.config, model, updates)
    given: dict[str, Any] = {"model": model, "config": config}
    if zero.own_optimizer:
        trainer.optimizer = None
        given["model_parameters"] = _groups(trainer, model, config)
    else:
        if zero.own_scheduler:
            trainer.create_optimizer()
        else:
            trainer._create_missing(updates)
        optimizer = given["optimizer"] = _without_empty_groups(trainer)
        # The engine puts flat parts in the place of the parameters.
        zero.given = optimizer, [list(group["params"]) for group in optimizer.param_groups]
    with as_launched(trainer):
        engine, optimizer, _, scheduler = library(args).initialize(**given)
    zero.engine, zero.trains = engine, True
    trainer.optimizer = getattr(optimizer, "optimizer", optimizer)
    if zero.own_scheduler:
        trainer.lr_scheduler = scheduler
    elif trainer.lr_scheduler is None:
        trainer.lr_scheduler = trainer.create_scheduler(updates, trainer.optimizer)
    logger.info("DeepSpeed trains: ZeRO stage %d, parameters in %s.", zero.stage, dtype_of(zero))


def _groups(trainer: Any, model: nn.Module, config: dict[str, Any]) -> list[Any]:
    """Return the parameters for DeepSpeed's optimizer; biases and norms are not decayed."""
    decay = configuration.value_at(config, "optimizer.params.weight_decay")
    if decay is None:
        return [p for p in model.parameters() if p.requires_grad]
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = parameter_groups(model, decayed, decay)
    return [group for group in groups if group["params"]]


def _without_empty_groups(trainer: Any) -> Any:
    """Return the trainer's optimizer; DeepSpeed would drop groups that its schedule counts."""
    groups = trainer.optimizer.param_groups
    if any(not group["params"] for group in groups):
        if trainer.lr_scheduler is not None and trainer._own_scheduler:
            trainer.lr_scheduler = None
        groups[:] = [group for group in groups if group["params"]]
    return trainer.optimizer


def _held(parameter: Any) -> Tensor:
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.detach()
