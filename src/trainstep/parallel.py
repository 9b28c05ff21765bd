"""``data_parallel``: one step of training, its micro-batches shared among ranks."""

from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from trainstep import collectives
from trainstep.batches import split_batch
from trainstep.errors import CaptureError
from trainstep.grads import Accumulator, sum_gradients
from trainstep.ranks import Group, check_power_of_two, unrecordable
from trainstep.state import TrainState, refuse_state
from trainstep.step import Step
from trainstep.sums import Sums
from trainstep.types import Buffers, Grads, Metrics, Params
from trainstep.whole import check_open


@frozen(eq=False)
class DataParallel:
    """A step whose batch is spread over ranks; what ``data_parallel`` returns."""

    step: Step
    group: Group = None
    exact: bool = field(default=False, kw_only=True)
    find_unused_parameters: bool = field(default=False, kw_only=True)
    broadcast_buffers: bool = field(default=True, kw_only=True)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update by all ranks' micro-batches, and metrics of all of them."""
        if not isinstance(state, TrainState):
            refuse_state("step(state, batch)", state, batch)
        loss, grads = self.sums(state, batch).mean()
        return self.step.update(state, loss, grads)

    def init(self, model: nn.Module | Params, seed: int = 0) -> TrainState:
        """Return the state at step 0: rank 0's, on every rank; see ``Step.init``."""
        state: TrainState = collectives.broadcast(self.step.init(model, seed), self.group)
        return state

    def sums(self, state: TrainState, batch: Any, key: Any = None) -> Sums:
        """Return what the micro-batches of all ranks add up to.

        They draw from ``key``, which is the state's key for losses if it is None.
        """
        mine = self._own(state, batch, self.step.loss_key(state) if key is None else key)
        grads = {
            # Adding -0.0 changes no bit of what other ranks have.
            name: mine.grads[name] if name in mine.grads else torch.full_like(value, -0.0)
            for name, value in state.params.items()
        }
        reached = self._reached(mine.grads, state.params)
        add = collectives.tree_sum if self.exact else collectives.psum
        mine.grads = grads
        total: Sums = add(mine, self.group)
        total.grads = {name: total.grads[name] for name in reached}
        total.buffers = self._buffers(state.buffers, mine.buffers)
        return total

    def check_recordable(self) -> None:
        """Make sure that what ranks exchange can be in a CUDA graph; see ``capture``.

        Raises:
            CaptureError: if not, with the reason.
        """
        if self.find_unused_parameters:
            raise CaptureError(
                "capture: find_unused_parameters=True waits for the device in every step, so that ranks "
                "agree on what was reached. Freeze parameters that no loss reaches, or do not capture the "
                "step."
            )
        reason = unrecordable(self.group)
        if reason is not None:
            raise CaptureError(f"capture: {reason}, or do not capture the step.")

    def _own(self, state: TrainState, batch: Any, key: Any) -> Sums:
        """Add up this rank's micro-batches: the first of them is number ``rank`` of all, and so on."""
        step, first, ranks = self.step, collectives.rank(self.group), collectives.size(self.group)
        parts = split_batch(batch, step.microbatches)
        scale = step.loss_scale(state)
        if self.exact or step.order == "tree":
            held = list(parts)
            return sum_gradients(
                step.loss_fn,
                state.params,
                state.buffers,
                held,
                key,
                order="tree",
                positions=range(first, first + ranks * len(held), ranks),
                scale=scale,
            )
        # Units of 1, because those of the first weight would differ between ranks.
        total = Accumulator(step.loss_fn, state.params, state.buffers, key, scale=scale, unit=1.0)
        for place, part in enumerate(parts):
            total.add(part, first + ranks * place)
        return total.take()

    def _reached(self, grads: Grads, params: Params) -> list[str]:
        """Return the parameters that any rank's loss depends on."""
        if self.find_unused_parameters:
            device = next(iter(params.values())).device
            flags = torch.tensor([name in grads for name in params], device=device)
            counts = collectives.psum(flags, self.group).tolist()
            return [name for name, count in zip(params, counts, strict=True) if count]
        unused = [name for name in params if name not in grads]
        if unused:
            raise ValueError(
                f"data_parallel: the loss on rank {collectives.rank(self.group)} does not depend on "
                f"{', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''}. If that is as it should be, "
                "pass find_unused_parameters=True, so that ranks agree on what was reached (it waits for "
                "the device once a step), or freeze these with requires_grad_(False)."
            )
        return list(params)

    def _buffers(self, before: Buffers, after: Buffers) -> Buffers:
        written = {name: b for name, b in after.items() if b is not before.get(name)}
        if not (written and self.broadcast_buffers and collectives.size(self.group) > 1):
            return after
        sent: dict[str, Tensor] = collectives.broadcast(written, self.group)
        return {**after, **sent}


def data_parallel(
    step: Step,
    group: Group = None,
    *,
    exact: bool = False,
    find_unused_parameters: bool = False,
    broadcast_buffers: bool = True,
) -> DataParallel:
    """Share the work of a step among ranks: ``state, metrics = parallel(state, share_of_the_batch)``.

    Every rank calls it with the same state and its own micro-batches, and gets the same state and metrics:
    gradients, losses, weights and ``aux`` are summed over ranks and divided once, so ranks may hold
    different numbers of samples. Guards, transforms and optimizer then do the same everywhere.

    Rank ``r`` of ``w`` takes micro-batches ``r, r + w, r + 2 w, ...`` of those that one process would take
    (with ``microbatches="iter"``: ``parallel(state, parts[r::w])``), at least one; micro-batch ``i`` draws
    the random numbers that it would draw there.

    Without a process group this is the step itself, whose gradients are added in units of 1.

    Args:
        step: what ``make_step`` returned, donated or compiled if you like.
        group: a process group or a ``DeviceMesh`` of one dimension; None is the default group.
        exact: add up in a fixed binary tree, so that 1, 2, 4, 8, ... ranks give the same bits, those of
            ``make_step(order="tree")`` on one. Buffers that training changes (running statistics) are
            excepted: they follow the micro-batches of rank 0.
        find_unused_parameters: the loss may leave out parameters, others on other ranks. Those that no
            rank reaches get no gradient. Waits for the device once a step.
        broadcast_buffers: replace the buffers that the loss returns by those of rank 0, as
            ``DistributedDataParallel`` does; with False every rank keeps its own.

    Raises:
        TypeError: if ``step`` was not made by ``make_step``, or is compiled as a whole.
        ValueError: for ``exact`` with a number of ranks that is no power of two; from the step, if the loss
            does not reach a parameter and ``find_unused_parameters`` is False.
    """
    if not isinstance(step, Step):
        raise TypeError(
            "data_parallel: expected what make_step returned, got "
            f"{getattr(step, '__name__', type(step).__name__)}"
        )
    check_open("data_parallel", step)
    if exact:
        check_power_of_two("data_parallel(exact=True)", collectives.size(group))
    return DataParallel(
        step,
        group,
        exact=exact,
        find_unused_parameters=find_unused_parameters,
        broadcast_buffers=broadcast_buffers,
    )
