"""``Step``: one training step as a function, ``state, metrics = step(state, batch)``."""

import struct
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from trainstep import tree
from trainstep.batches import split_batch
from trainstep.grads import Order, accumulate
from trainstep.guards import Guard, finite, judge, require_finite, scale_, skip_unless
from trainstep.initial import init
from trainstep.losses import Loss, check_aux
from trainstep.optim.base import Optimizer
from trainstep.optim.multi import is_rate
from trainstep.pending import Pending
from trainstep.rng import Key
from trainstep.scaling import DynamicScale
from trainstep.state import TrainState, consume, refuse_state
from trainstep.transforms import Context, Transform
from trainstep.transforms.compose import run
from trainstep.types import Grads, Hyper, HyperSchedule, LossFn, Metrics, OptState, Params, Schedule

OnNonfinite = Literal["ignore", "skip", "raise"]

_METRICS = ("loss", "grad_norm", "lr", "weight", "skipped", "loss_scale")

# Branches of a step's key, so that transforms never draw what the loss drew.
_LOSS, _TRANSFORMS = 0, 1


@frozen(eq=False)
class Step:
    """A pure training step; what ``make_step`` returns."""

    loss_fn: LossFn
    optimizer: Optimizer
    schedule: Schedule | HyperSchedule | None = None
    transforms: tuple[Transform, ...] = ()
    microbatches: int | Literal["iter"] = 1
    on_nonfinite: OnNonfinite = "ignore"
    guards: tuple[Guard, ...] = field(default=(), kw_only=True)
    order: Order = field(default="sequential", kw_only=True)
    donates: bool = field(default=False, kw_only=True)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and metrics that stay on the device."""
        if not isinstance(state, TrainState):
            refuse_state("step(state, batch)", state, batch)
        loss, grads = accumulate(
            self.loss_fn,
            state.params,
            state.buffers,
            split_batch(batch, self.microbatches),
            self.loss_key(state),
            order=self.order,
            scale=self.loss_scale(state),
            # An update that may be refused must find the buffers as they were.
            donate_buffers=self.in_place and self.on_nonfinite != "raise",
        )
        return self.update(state, loss, grads)

    def update(
        self,
        state: TrainState,
        loss: Loss,
        grads: Grads,
        hyper: Hyper | None = None,
        key: Key | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Finish a step whose gradients are known: guards, transforms, optimizer, metrics.

        Args:
            state: the state before the step.
            loss: the loss that the gradients belong to.
            grads: gradients of the mean; they may be overwritten.
            hyper: hyperparameters, instead of those that the schedule gives.
            key: randomness of the transforms, instead of that of the state.
        """
        return self.finish(state, self.prepare(state, loss, grads, hyper, key))

    def prepare(
        self,
        state: TrainState,
        loss: Loss,
        grads: Grads,
        hyper: Hyper | None = None,
        key: Key | None = None,
    ) -> Pending:
        """Do the part of ``update`` before the optimizer: guards and transforms; the state is only read."""
        if loss.aux:
            check_aux("make_step", loss.aux, _METRICS)
        extras = self.memory(state)
        hyper = self.hyper(state.step) if hyper is None else hyper
        context = self._context(state, loss, key)
        # Without gradients, the zero is on the device where the others are.
        norm = context.global_norm(grads) if grads else torch.zeros((), device=loss.value.device)
        if self.on_nonfinite == "raise":
            require_finite(state.step, loss, norm)
        ok = finite(loss, norm) if self.on_nonfinite == "skip" else None
        ok, factor, seen = judge(self.guards, extras, loss, norm, ok)
        if factor is not None:
            grads = scale_(grads, factor)
        after = extras
        if self.transforms:
            grads, kept = run(self.transforms, grads, extras["transforms"], state.params, context)
            after = {**extras, "transforms": kept}
        return Pending(loss, grads, hyper, norm, ok, seen, extras, after)

    def finish(self, state: TrainState, pending: Pending) -> tuple[TrainState, Metrics]:
        """Do the rest of ``update``: optimizer and metrics."""
        loss, grads, hyper, norm = pending.loss, pending.grads, pending.hyper, pending.norm
        ok, seen, extras, after = pending.ok, pending.seen, pending.before, pending.after
        refused = ok is not None and self.optimizer.imperative and not bool(ok)
        params, opt_state = self._apply(state, {} if refused else grads, hyper)
        buffers = state.buffers if loss.buffers is None else loss.buffers
        result = TrainState(state.step + 1, params, buffers, opt_state, state.key, after)
        if ok is not None:
            before = state if extras is state.extras else state.evolve(extras=extras)
            if self.optimizer.imperative:  # has done, or left undone, what it should
                before = before.evolve(params=params, opt_state=opt_state)
            result = skip_unless(ok, result, before, in_place=self.donates)
        if seen:
            result = result.evolve(extras={**result.extras, **seen})
        metrics = self._metrics(loss, norm, hyper)
        if ok is not None:
            metrics["skipped"] = (~ok).to(torch.int64)
        if "loss_scale" in seen:
            metrics["loss_scale"] = extras["loss_scale"]["scale"]
        if self.donates:
            consume(state)
        return result, metrics

    def _apply(self, state: TrainState, grads: Grads, hyper: Hyper) -> tuple[Params, OptState]:
        params, opt_state = state.params, state.opt_state
        donate = self.in_place or (self.donates and self.optimizer.imperative)
        if self.optimizer.capturable and any(p.is_cuda for p in islice(params.values(), 1)):
            # A recorded kernel reads rates as float32 from the device; hence all of them do.
            hyper = {
                n: _float32(v) if isinstance(v, float) and is_rate(n) else v
                for n, v in hyper.items()
            }
        if grads:
            return self.optimizer.apply(params, grads, opt_state, hyper, donate=donate)
        # Held by a transform, or refused. Copies, because a pure result shares nothing that moves.
        return (params, opt_state) if donate else tree.clone((params, opt_state))

    def _context(self, state: TrainState, loss: Loss, key: Key | None) -> Context:
        return Context(
            state.step,
            self.transform_key(state) if key is None else key,
            owned=True,
            donated=self.in_place,
            weight=loss.weight,
        )

    @property
    def in_place(self) -> bool:
        """Whether the given state may be overwritten before it is known if the update happens."""
        return self.donates and not self.skips

    @property
    def skips(self) -> bool:
        """Whether an update can be refused on the device."""
        return self.on_nonfinite == "skip" or any(guard.skips for guard in self.guards)

    def hyper(self, step: int) -> Hyper:
        """Return the hyperparameters that the schedule gives for ``step``."""
        if self.schedule is None:
            return {}
        scheduled = self.schedule(step)
        return scheduled if isinstance(scheduled, Mapping) else {"lr": scheduled}

    def loss_key(self, state: TrainState) -> Key:
        """Return the key of this step's loss; micro-batch ``i`` uses its ``fold_in(i)``."""
        return state.key.fold_in(state.step, _LOSS)

    def transform_key(self, state: TrainState) -> Key:
        """Return the key of this step's transforms."""
        return state.key.fold_in(state.step, _TRANSFORMS)

    def loss_scale(self, state: TrainState) -> Tensor | None:
        """Return what this step's loss is multiplied by before the backward pass; None for 1."""
        if not any(isinstance(guard, DynamicScale) for guard in self.guards):
            return None
        scale: Tensor = self.memory(state)["loss_scale"]["scale"]
        return scale

    def memory(self, state: TrainState) -> dict[str, Any]:
        """Return ``state.extras`` with the initial memory of transforms and guards that it lacks."""
        missing = {g.name: g.init(state.params) for g in self.guards if g.name not in state.extras}
        if self.transforms and not state.extras.get("transforms"):
            missing["transforms"] = self.init_transforms(state.params)
        return {**state.extras, **missing} if missing else state.extras

    def init(self, model: nn.Module | Params, seed: int = 0, *, copy: bool = True) -> TrainState:
        """Return the state at step 0, with everything that this step keeps; see ``init``."""
        state = init(model, self.optimizer, seed, copy=copy)
        extras = self.memory(state)
        if self.skips:
            extras = {**extras, "skipped": torch.zeros((), dtype=torch.int64)}
        return state.evolve(extras=extras)

    def init_transforms(self, params: Params) -> tuple[Any, ...]:
        """Return the initial states of the transforms, in their order."""
        return tuple(transform.init(params) for transform in self.transforms)

    def _metrics(self, loss: Loss, norm: Tensor, hyper: Hyper) -> Metrics:
        metrics = {"loss": loss.value, "grad_norm": norm, "weight": torch.as_tensor(loss.weight)}
        lr = hyper.get("lr", self.optimizer.hyper.get("lr"))
        if lr is not None:
            metrics["lr"] = torch.as_tensor(lr, dtype=torch.float64)
        return metrics | {name: extra / loss.weight for name, extra in loss.aux.items()}


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
