"""Gradients from CUDA graphs: ``training_step`` recorded, for every shape of batch, and replayed."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

import trainstep as ts
from trainer.changes import Changes
from trainer.engine import LocalEngine
from trainer.host_reads import HostReads, facts
from trainstep.captured import CapturedStep
from trainstep.graphs import is_recording
from trainstep.rng import SlotKey
from trainstep.stages import Inputs, as_input, signature
from trainstep.types import Buffers, Grads, Metrics

logger = logging.getLogger(__name__)

_KINDS = 4
"""So many recordings of a shape there may be on average, for batches whose masks differ in kind."""


@define(eq=False)
class RetreatingStep(CapturedStep):
    """A captured step for given gradients; an update that cannot be recorded is made without a graph.

    Attributes:
        retreat: called with the reason then.
    """

    retreat: Callable[[str], Any] = field(kw_only=True)

    def finish(
        self, state: ts.TrainState, pending: tuple[ts.Loss, Grads]
    ) -> tuple[ts.TrainState, Metrics]:
        """Make the update. Nothing has happened to the state when a recording fails."""
        state = self.at_home(state)
        try:
            return self.update(state, *pending)
        except ts.CaptureError as error:
            failure = str(error)
        self.retreat(failure)
        return self.step.finish(state, self.step.prepare(state, *pending))


class CapturedEngine:
    """Runs the micro-batches of an update as one CUDA graph; goes on without graphs where that fails.

    Args:
        local: the engine whose work is recorded.
        step: the captured step, with whose graphs memory is shared.
        device: the CUDA device of all parameters.
        changes: tells of what others have changed in the model.
        reads: answers what the model asks on the host; None if nothing may be asked.
        retreat: called once, with the reason, if training is to go on without graphs.
    """

    def __init__(
        self,
        local: LocalEngine,
        step: CapturedStep,
        device: torch.device,
        changes: Changes,
        reads: HostReads | None,
        retreat: Callable[[str], Any],
    ) -> None:
        self._local, self._step, self._device = local, step, device
        self._changes, self._reads, self._retreat = changes, reads, retreat
        self._facts: tuple[Any, ...] | None = None
        self._graphs: Inputs | None = None
        self._grads: Grads = {}
        self._losses: list[Tensor] = []
        self._over = False
        self._begin()

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run an update's micro-batches at once; yields their joint loss after each."""
        self._local.prepare()
        self._follow_changes()
        if self._graphs is not None:
            batches = [as_input(batch) for batch in batches]
            self._grads = {}  # else those of an update without graph would live on through the next
            try:
                total, shares, self._grads = self._graphs(
                    lambda inputs, key: self._run(inputs, window, key),
                    (batches, items, self._facts),
                    key,
                )
            except ts.CaptureError as error:
                failure = str(error)
            else:
                self._local.show(self._grads)
                # Cloned, since the next replay overwrites them.
                self._losses = [] if shares is None else list(shares.clone().unbind())
                for _ in range(window):
                    yield total
                return
            self.give_up(failure)
            self._end()
        yield from self._local.passes(batches, items, window, key)

    def note(self, window: list[Any]) -> None:
        """Take note of an update's micro-batches while they are on the host."""
        if self._reads is not None and self._graphs is not None:
            if self._reads.asked is False:
                self._facts = ((),) * len(window)  # as for batches without masks
            else:
                known = tuple(map(facts, window))
                self._facts = None if None in known else known

    def check(self) -> None:
        """Make sure that replays did what the model would have done; see ``HostReads.check``."""
        if self._reads is not None:
            self._reads.check()

    def close(self) -> None:
        """Let go of all graphs.

        Garbage may be collected in a process that was forked, of a loader's workers say, and a graph that
        is freed there aborts it.
        """
        self._over = True
        if self._graphs is not None:
            self._end()
        self._reads = None

    def give_up(self, reason: str) -> None:
        """Go on without graphs from the next update on; gradients of this one may still be in use."""
        if not self._over:
            self._over = True
            self._retreat(reason)

    def losses(self) -> list[Tensor]:
        """Return what each of several micro-batches added to the loss."""
        return self._losses if self._graphs is not None else self._local.losses()

    def collect(self) -> Grads:
        """Return the gradients of the last update; the next one overwrites them."""
        return self._grads if self._graphs is not None else self._local.collect()

    def drop(self) -> None:
        """Forget gradients that no graph holds."""
        if self._graphs is None:
            self._local.drop()

    def buffers(self) -> Buffers:
        """Return the module's buffers."""
        return self._local.buffers()

    def _follow_changes(self) -> None:
        if not self._over:
            change = self._changes.found(self._recorded)
            if change.final:
                self.give_up(change.reason)
            elif change.reason:
                logger.info("Steps are recorded anew: %s.", change.reason)
                self._begin()
        if self._over and self._graphs is not None:
            self._end()

    def _recorded(self) -> bool:
        return self._graphs is not None and self._graphs.recorded

    def _begin(self) -> None:
        self._local.drop()
        self._grads = {}
        self._step.forget()
        limit = self._step.limit if self._reads is None else self._step.limit * _KINDS
        self._graphs = Inputs(self._device, self._step.pool, limit)

    def _end(self) -> None:
        self._local.drop()
        self._graphs, self._grads, self._losses = None, {}, []
        self._step.forget()
        torch.cuda.empty_cache()  # what graphs held is another size than what comes now

    def _run(
        self, inputs: tuple[Any, Any, Any], window: int, key: Any
    ) -> tuple[Tensor | None, Tensor | None, Grads]:
        batches, items, known = inputs
        reads = self._reads if known is not None else None
        if reads is not None and reads.asked is False:
            reads = None
        if is_recording():
            try:
                with reads.recorded(signature(inputs, [])) if reads else nullcontext():
                    return self._pass(batches, items, window, key)
            except BaseException:
                self._local.keep_buffers(values=False)  # none that the failed recording has made
                raise
            finally:
                self._changes.take_in()
        rehearsed = isinstance(key, SlotKey)
        before = ts.tree.clone(self._local.buffers()) if rehearsed else {}
        try:
            with (
                self._changes.made_by_the_model(refused=rehearsed),
                reads.rehearsed(signature(inputs, [])) if reads and rehearsed else nullcontext(),
            ):
                return self._pass(batches, items, window, key)
        except BaseException:
            self._local.drop()
            for name, tensor in self._local.buffers().items():
                if name in before:
                    tensor.copy_(before[name])
            raise

    def _pass(
        self, batches: Any, items: Any, window: int, key: Any
    ) -> tuple[Tensor | None, Tensor | None, Grads]:
        self._local.drop()
        *_, total = self._local.passes(batches, items, window, key)
        self._local.keep_buffers()
        shares = torch.stack(self._local.losses()) if window > 1 else None
        return total, shares, self._local.collect()
