"""``make_step``: a step out of a loss, an optimizer and what goes between them."""

from collections.abc import Iterable, Sequence
from typing import Literal

from trainstep.grads import Order
from trainstep.guards import Guard
from trainstep.optim.base import Optimizer
from trainstep.parts import check_choices, check_loss, check_names, check_parts
from trainstep.scaling import DynamicScale
from trainstep.step import OnNonfinite, Step
from trainstep.transforms import Transform
from trainstep.types import HyperSchedule, LossFn, Schedule


def make_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    schedule: Schedule | HyperSchedule | None = None,
    transforms: Transform | Sequence[Transform] = (),
    microbatches: int | Literal["iter"] = 1,
    on_nonfinite: OnNonfinite = "ignore",
    *,
    loss_scale: DynamicScale | None = None,
    guards: Sequence[Guard] = (),
    order: Order = "sequential",
) -> Step:
    """Compose a pure training step, ``state, metrics = step(state, batch)``.

    Args:
        loss_fn: ``loss_fn(params, buffers, batch, key) -> Loss``; see ``module_loss``.
        optimizer: see ``trainstep.optim``.
        schedule: step -> learning rate, or a mapping of several hyperparameters; None uses the
            optimizer's own.
        transforms: applied to the gradients in order, between the loss and the optimizer.
        microbatches: how many parts of (nearly) equal size the leading axis of every tensor in the
            batch is split into, see ``batches.split_batch``; ``"iter"`` takes the batch as an iterable of
            micro-batches.
        on_nonfinite: what happens if loss or gradient norm is not finite: ``"ignore"`` updates all
            the same, ``"skip"`` keeps parameters, buffers and moments and counts it in
            ``extras["skipped"]`` without a host sync, ``"raise"`` (which syncs) raises
            FloatingPointError and leaves the state as it was.
        loss_scale: scale the loss for float16, dynamically, and skip updates that overflow.
        guards: further guards, such as ``spike_guard``; they judge gradients without the loss scale,
            before the transforms. An update happens if all agree.
        order: in which order micro-batches are added: ``"sequential"``, or ``"tree"``, whose bits do not
            depend on how many ranks share the work; see ``grads.sum_gradients``.

    Returns:
        The step. Its metrics are ``loss`` (mean), ``grad_norm`` (before transforms), ``weight`` (items
        in the batch), ``lr``, and the loss's ``aux`` divided by the weight; with guards that can refuse
        an update, ``skipped``: 1 if this one was, else 0; with a loss scale, ``loss_scale``: the one
        that was used. ``lr`` is the schedule's rate, else the one that the optimizer was built with;
        factors and schedules inside the optimizer (``scaled``, ``scheduled``, ``layerwise_decay``) are not
        in it. Without a schedule it is absent where the optimizer has no single rate of its own:
        ``partition``, ``scheduled``, and a ``chain`` of several optimizers.

    Raises:
        ValueError: for choices that do not exist; from the step, for a batch that cannot be split, and for
            ``aux`` with the name of another metric.
        TypeError: for a loss, optimizer, schedule or transform that is none.
    """
    check_loss(loss_fn)
    parts = tuple(transforms) if isinstance(transforms, Iterable) else (transforms,)
    check_parts(optimizer, schedule, parts)
    watching = tuple(guards) if loss_scale is None else (loss_scale, *guards)
    check_choices(microbatches, on_nonfinite, order, scales=loss_scale is not None)
    check_names([guard.name for guard in watching])
    return Step(
        loss_fn,
        optimizer,
        schedule,
        parts,
        microbatches,
        on_nonfinite,
        guards=watching,
        order=order,
    )
