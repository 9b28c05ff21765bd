"""The training loop, written once, as a generator of events.

The loop knows data, gradients and the pure step; it does not know callbacks, logs or files. Whoever
iterates over it reacts to each event before the loop goes on, and steers it through ``control``.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, Protocol

from attrs import define, field
from torch import Tensor

import trainstep as ts
from trainer.plan import Plan
from trainstep.pending import Pending
from trainstep.types import Buffers, Grads, Metrics


class Event(Enum):
    """What has just happened, or is about to; the value is the name of the callbacks' method."""

    TRAIN_BEGIN = "on_train_begin"
    EPOCH_BEGIN = "on_epoch_begin"
    STEP_BEGIN = "on_step_begin"
    SUBSTEP_END = "on_substep_end"
    PRE_OPTIMIZER_STEP = "on_pre_optimizer_step"
    OPTIMIZER_STEP = "on_optimizer_step"
    STEP_END = "on_step_end"
    EPOCH_END = "on_epoch_end"


class Control(Protocol):
    """The two flags by which a consumer stops the loop."""

    should_epoch_stop: bool
    should_training_stop: bool


class Engine(Protocol):
    """Turns micro-batches into gradients; one implementation per way to distribute."""

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: ts.Key
    ) -> Iterator[Tensor | None]:
        """Add the gradients of an update's micro-batches; yields the step's loss so far after each.

        Args:
            batches: the micro-batches.
            items: what the loss is divided by, if anything counts.
            window: how many micro-batches there are.
            key: randomness of the update; micro-batch ``i`` uses its ``fold_in(i)``.
        """
        ...

    def losses(self) -> list[Tensor]:
        """Return what each of several micro-batches added to the loss; nothing if only the sum is known."""
        ...

    def collect(self) -> Grads:
        """Return the gradients of the update."""
        ...

    def drop(self) -> None:
        """Forget them."""
        ...

    def buffers(self) -> Buffers:
        """Return the tensors that the module now has as buffers, by the names of the state's."""
        ...


class Batches(Protocol):
    """The run's data; see ``trainer.data.feed.Feed``."""

    def __call__(self, epoch: int, skip: int) -> Iterator[Any]: ...

    def state(self, epoch: int) -> dict[str, Any] | None: ...

    def load(self, state: dict[str, Any] | None) -> None: ...


@define(eq=False)
class Run:
    """One training: what it works with, and where it stands.

    Attributes:
        plan: lengths of the run.
        step: the pure step, donated.
        state: the state after the last update.
        engine: makes gradients.
        batches: ``batches(epoch, skip)`` iterates over an epoch's micro-batches from number ``skip``; it
            also knows what a checkpoint keeps of their data.
        take: ``take(batches)`` returns the micro-batches of the next update, none at the end, and what
            their loss is divided by; None where nothing counts.
        control: stop flags.
        accumulation: micro-batches to an update.
        ahead: iterates over the micro-batches of an update while the next ones go to the device.
        verify: makes sure, before anything is told or saved, that it is what the model computes.
        close: lets go of what the run has recorded, at its end.
        refresh: called before gradients are judged, to bring the step in line with what callbacks may
            have set.
        watched: whether somebody may put other gradients in place before the optimizer takes them, or
            set other options for it.
        whole: a context in which an update is put in place, so that nothing interrupts that halfway.
        epoch: epoch in progress, from 0.
        batch: micro-batches of this epoch that are done.
        in_epoch: this epoch has begun and not been ended; after a last update that was saved, its end
            is all that is left to do.
        metrics: of the last update, on the device.
        exhausted: an epoch had no batch at all.
    """

    plan: Plan
    step: ts.Step
    state: ts.TrainState
    engine: Engine
    batches: Batches
    take: Callable[[Iterator[Any]], tuple[list[Any], Any]]
    control: Control
    accumulation: int
    ahead: Callable[[list[Any]], Iterable[Any]] = iter
    verify: Callable[[], Any] = bool  # which does nothing, as below
    close: Callable[[], Any] = bool
    refresh: Callable[[], object] = bool
    watched: Callable[[], bool] = bool
    whole: AbstractContextManager[None] = field(factory=nullcontext)
    epoch: int = 0
    batch: int = 0
    in_epoch: bool = False
    metrics: Metrics = field(factory=dict)
    exhausted: bool = False

    @property
    def progress(self) -> float:
        """Epochs done, as a fraction."""
        return self.epoch + self.plan.epoch_fraction(self.batch, self.accumulation)

    @property
    def finished(self) -> bool:
        """Whether all updates are done; at least one is made, whatever ``max_steps`` says."""
        return self.state.step >= max(self.plan.max_steps, 1)


def events(run: Run) -> Iterator[Event]:
    """Train, yielding each event in order; see ``Event``.

    When ``EPOCH_END`` is yielded, ``run`` already stands at the beginning of the next epoch, unless
    training was stopped in the middle of this one: a checkpoint made then resumes where it should.
    """
    yield Event.TRAIN_BEGIN
    if run.control.should_training_stop:
        return
    while run.epoch < run.plan.num_train_epochs and (run.in_epoch or not run.finished):
        first = run.batch
        run.in_epoch = True
        yield Event.EPOCH_BEGIN
        over = yield from _epoch(run)
        # With nothing to train on, another epoch would not end either.
        if run.batch == first == 0 and not run.finished:
            run.exhausted = run.control.should_training_stop = True
        if over:
            run.epoch, run.batch = run.epoch + 1, 0
        run.in_epoch = False
        yield Event.EPOCH_END
        if run.control.should_training_stop:
            break


def _epoch(run: Run) -> Generator[Event, None, bool]:
    """Train on the rest of an epoch; returns whether it is over."""
    if run.finished:
        return run.batch == run.plan.batches_per_epoch
    batches = iter(run.batches(run.epoch, run.batch))
    # A window is fetched whole, on the host, because its last micro-batch and the number of items
    # must be known first; only one micro-batch at a time goes to the device.
    while (taken := run.take(batches))[0]:
        yield Event.STEP_BEGIN
        yield from _update(run, *taken)
        yield Event.STEP_END
        if run.control.should_epoch_stop:
            return True
        if run.control.should_training_stop:
            return run.batch == run.plan.batches_per_epoch
    return True


def _update(run: Run, window: list[Any], items: Any) -> Iterator[Event]:
    key = run.step.loss_key(run.state)
    before = ts.tree.clone(run.engine.buffers()) if run.step.skips else {}
    total: Any = None
    passes = run.engine.passes(run.ahead(window), items, len(window), key)
    for number, so_far in enumerate(passes, 1):
        total = so_far
        if number < len(window):
            yield Event.SUBSTEP_END
    loss = ts.Loss(total, 1, _set_apart(run, before))  # the engine has divided already
    grads = run.engine.collect()
    run.refresh()
    if (scale := run.step.loss_scale(run.state)) is not None:
        ts.unscale_(grads.values(), scale)
    pending: Any = run.step.prepare(run.state, loss, grads)
    yield Event.PRE_OPTIMIZER_STEP
    if run.watched() and isinstance(pending, Pending):
        pending = pending.with_grads(run.engine.collect(), run.step.hyper(run.state.step))
    with run.whole:
        run.state, run.metrics = run.step.finish(run.state, pending)
        if before:  # a refused update takes the module's buffers back as well
            for name, tensor in run.engine.buffers().items():
                tensor.copy_(run.state.buffers[name])
        run.batch += len(window)
    yield Event.OPTIMIZER_STEP
    run.engine.drop()


def _set_apart(run: Run, before: Buffers) -> Buffers:
    """Return the buffers after a window. The module has changed those of the state in place.

    With ``before``, its values are put back into the state, which then has what the step keeps if it
    refuses the update.
    """
    if not before:
        return run.state.buffers
    after = ts.tree.clone(run.engine.buffers())
    for name, tensor in before.items():
        run.state.buffers[name].copy_(tensor)
    return {**run.state.buffers, **after}
