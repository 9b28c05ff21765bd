"""Vectorized training: many models at once, and gradients sample by sample.

``ensemble(step)`` trains the members of a stacked state together; ``per_sample_grads(loss_fn)`` takes the
gradient of every sample of a batch. Both run the module under ``torch.func.vmap``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, field, frozen

from trainstep import tree
from trainstep.guards import require_finite
from trainstep.losses import Loss
from trainstep.member_batches import InAxes, member_batch, split_for_members
from trainstep.member_grads import MemberGradients, Randomness, check_randomness
from trainstep.members import Keys as Keys
from trainstep.members import Members as Members
from trainstep.members import Split, keys_of
from trainstep.members import stack as stack
from trainstep.members import unstack as unstack
from trainstep.per_sample import per_sample_grads as per_sample_grads
from trainstep.schedules import constant
from trainstep.state import TrainState, consume
from trainstep.step import Step
from trainstep.types import Grads, Hyper, Metrics, Schedule
from trainstep.whole import check_open


@frozen(eq=False)
class Ensemble:
    """A step over stacked states; what ``ensemble`` returns."""

    step: Step
    lr: tuple[float | Schedule, ...] | None = field(default=None, kw_only=True)
    hyper: tuple[Hyper, ...] | None = field(default=None, kw_only=True)
    in_axes: InAxes = field(default=None, kw_only=True)
    randomness: Randomness = field(default="different", kw_only=True)
    exact: bool = field(default=False, kw_only=True)

    @property
    def donates(self) -> bool:
        """Whether the state that is given is consumed."""
        return self.step.donates

    def donated(self) -> "Ensemble":
        """Return the ensemble of the donated step; see ``trainstep.donate``."""
        return evolve(self, step=evolve(self.step, donates=True))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the stacked state after one update, and metrics of shape (members,)."""
        count = len(keys_of("ensemble", state))
        steps = self.member_steps(count)
        run = self._one_by_one if self.exact else self._together
        result, metrics = run(steps, state, batch)
        if self.donates:
            consume(state)
        names = {name: None for each in metrics for name in each}
        return result, {name: torch.stack([each[name] for each in metrics]) for name in names}

    def member_steps(self, count: int) -> list[Step]:
        """Return each member's step, donated: what runs one by one on copies or views of its own.

        Raises:
            ValueError: if there is not one ``lr`` and ``hyper`` for each of ``count`` members.
        """
        for what, given in (("lr", self.lr), ("hyper", self.hyper)):
            if given is not None and len(given) != count:
                raise ValueError(
                    f"ensemble: {what} has {len(given)} entries and the state {count} members; give one "
                    "for each"
                )
        return [self._member_step(i) for i in range(count)]

    def _member_step(self, index: int) -> Step:
        changes: dict[str, Any] = {"donates": True}
        if self.lr is not None:
            lr = self.lr[index]
            changes["schedule"] = lr if callable(lr) else constant(lr)
        if self.hyper is not None:
            optimizer = self.step.optimizer
            changes["optimizer"] = evolve(optimizer, hyper={**optimizer.hyper, **self.hyper[index]})
        return evolve(self.step, **changes)

    def _one_by_one(
        self, steps: list[Step], state: TrainState, batch: Any
    ) -> tuple[TrainState, list[Metrics]]:
        if self.step.microbatches == "iter":
            batch = list(batch)  # an iterator would be used up by the first member
        results, metrics = [], []
        for index, (step, member) in enumerate(zip(steps, unstack(state, copy=False), strict=True)):
            # A copy also where it will be overwritten: matrix products may round differently on
            # memory that is not aligned as tensors of their own are.
            with _named(index):
                after, seen = step(tree.clone(member), self._batch_of(batch, len(steps), index))
            results.append(after)
            metrics.append(seen)
        return Split(len(steps)).join(results), metrics

    def _batch_of(self, batch: Any, count: int, index: int) -> Any:
        if self.step.microbatches == "iter":
            return [member_batch(part, self.in_axes, count, index) for part in batch]
        return member_batch(batch, self.in_axes, count, index)

    def _together(
        self, steps: list[Step], state: TrainState, batch: Any
    ) -> tuple[TrainState, list[Metrics]]:
        split = Split(len(steps))
        found = self._gradients(split, state, batch)
        if self.step.on_nonfinite == "raise":
            for index, (loss, grads) in enumerate(found):
                with _named(index):
                    require_finite(state.step, loss, tree.global_norm(grads.values()))
        members = split.members(state if self.donates else self._copied(state))
        after: list[TrainState] = []
        metrics: list[Metrics] = []
        for step, member, (loss, grads) in zip(steps, members, found, strict=True):
            result, seen = step.update(member, loss, grads)
            after.append(result)
            metrics.append(seen)
        return split.join(after), metrics

    def _gradients(self, split: Split, state: TrainState, batch: Any) -> list[tuple[Loss, Grads]]:
        keys = [self.step.loss_key(state.evolve(key=key)) for key in keys_of("ensemble", state)]
        scale = self.step.loss_scale(state)  # of shape () where the state has none yet
        gradients = MemberGradients(
            self.step.loss_fn,
            state.params,
            state.buffers,
            keys,
            split,
            self.in_axes,
            self.randomness,
            None if scale is None else scale.expand(len(keys)),
        )
        parts = split_for_members(batch, self.step.microbatches, self.in_axes, len(keys))
        return gradients.run(parts, self.step.order)

    def _copied(self, state: TrainState) -> TrainState:
        """Copy what the members' donated updates write to."""
        buffers = tree.clone(state.buffers) if self.step.skips else state.buffers
        return state.evolve(
            params=tree.clone(state.params),
            buffers=buffers,
            opt_state=tree.clone(state.opt_state),
            extras=tree.clone(state.extras),
        )


def ensemble(
    step: Step,
    *,
    lr: Sequence[float | Schedule] | None = None,
    hyper: Sequence[Hyper] | None = None,
    in_axes: InAxes = None,
    randomness: Randomness = "different",
    exact: bool = False,
) -> Ensemble:
    """Make a step that trains several models at once, ``state, metrics = ensemble(step)(state, batch)``.

    The state is a ``stack`` of states; metrics have shape (members,). Losses and gradients of all members
    are computed together, under ``torch.func.vmap``. Then each member's transforms, guards and optimizer
    run on its part of the stacked tensors, with the step's own kernels: each member is clipped, skipped
    and scaled by itself.

    How the members compare with as many single runs of ``step``:

    - With ``exact=True`` they are equal to the last bit, dropout included: the members run one by one.
    - Otherwise, in modules without randomness, the gradients differ by rounding, because batched matrix
      products and sums add in another order: by a few units in the last place of the largest entry of
      the whole gradient (tested: at most 16 for models of a few layers, in float32 and float64). On
      equal gradients, elementwise updates have equal bits.
    - Dropout under ``vmap`` draws for all members in one call, from a key derived from all of theirs. The
      draws are a function of keys, step and micro-batch, as always, but are not those of single runs,
      and change if a member is added.

    BatchNorm statistics, microbatches in either order, loss scaling and gradient transformations work.
    What does not run under ``vmap`` raises, and says so: GRU and LSTM, gradient checkpointing,
    ``autograd.Function`` without ``setup_context``, control flow that depends on data. Use
    ``exact=True`` for these. ``scaled_dot_product_attention`` works: with FlashAttention on CUDA in half
    precision, elsewhere by plain matrix products, because the other kernels have no batching rule, or one
    that fails. An operation without a batching rule of its own runs once per member, and PyTorch warns.

    Args:
        step: made by ``make_step``. If it was donated (``ensemble(donate(step))``), the stacked state is
            consumed, and its tensors are updated in place unless ``exact``.
        lr: a learning rate or a schedule for each member, instead of the step's schedule.
        hyper: further hyperparameters for each member, such as ``[{"weight_decay": 0.1}, {}]``, over the
            optimizer's own.
        in_axes: the axis of the batch's tensors that counts members: None if all members get the same
            batch, an int if each gets its own, or a mapping from the batch's names to either.
        randomness: ``"different"`` draws for each member; ``"same"`` for all, those of the first member
            alone; ``"error"`` raises where a module draws.
        exact: run the members one by one, on copies.

    Raises:
        TypeError: if ``step`` was not made by ``make_step``; from the step, for a state that is no stack.
        ValueError: for unknown hyperparameters or choices; from the step, for a number of members that
            does not fit, and where a single step raises. With ``on_nonfinite="raise"`` every member is
            checked before any is updated.
    """
    if not isinstance(step, Step):
        kind = getattr(step, "__name__", type(step).__name__)
        raise TypeError(f"ensemble: expected what make_step returned, got {kind}")
    check_open("ensemble", step)
    check_randomness("ensemble", randomness)
    _check_hyper(step, lr, hyper)
    return Ensemble(
        step,
        lr=None if lr is None else tuple(lr),
        hyper=None if hyper is None else tuple(dict(each) for each in hyper),
        in_axes=in_axes,
        randomness=randomness,
        exact=exact,
    )


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say which member an error is about."""
    try:
        yield
    except FloatingPointError as error:
        error.add_note(f"ensemble: this is member {index}")
        raise


def _check_hyper(
    step: Step,
    lr: Sequence[float | Schedule] | None,
    hyper: Sequence[Mapping[str, Any]] | None,
) -> None:
    given = {name for each in hyper or () for name in each}
    used = given | ({"lr"} if lr is not None else set())
    unknown = sorted(used - step.optimizer.accepts)
    if unknown:
        raise ValueError(
            f"ensemble: {step.optimizer.name} has no hyperparameter {', '.join(unknown)}; known: "
            f"{', '.join(sorted(step.optimizer.accepts)) or 'none'}"
        )
    if "lr" in given and (lr is not None or step.schedule is not None):
        raise ValueError(
            "ensemble: hyper has lr, which a schedule would override; give the rates as lr=[...]"
        )
