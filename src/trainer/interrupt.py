"""Signals during training: what they ask for is done between two steps, never in the middle of one.

With ``enable_jit_checkpoint=True`` the first SIGTERM or SIGINT (Ctrl-C) lets the step in progress end,
saves a complete checkpoint and leaves ``train()`` with ``TrainingInterrupted``, so that the process ends
with status 75 unless that is caught. It takes one step and one save; an evaluation is broken off at its
next batch, and what was still to be logged, evaluated and saved at that step is made up for when training
is resumed. A second signal ends the process at once.

Without it signals do what they do in any Python program, except that ``KeyboardInterrupt`` is not raised
while a new state is being put in place: ``trainer.train_state`` can be used afterwards.

Handlers are only installed in the main thread, as Python demands, and put back when training ends.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from attrs import define, field

from trainer.callbacks import TrainerCallback
from trainer.checkpoint import checkpoint_dir
from trainer.loop import Event, Run

logger = logging.getLogger(__name__)

EXIT_STATUS = 75
"""What a process ends with when it has saved and may be started again (EX_TEMPFAIL in sysexits.h)."""

_ASKING = (signal.SIGTERM, signal.SIGINT)
_SWITCHES = ("should_log", "should_evaluate", "should_save")


class TrainingInterrupted(SystemExit):
    """Training was ended by a signal, after a complete checkpoint was saved.

    Attributes:
        checkpoint: its folder.
        step: its step.
        code: 75, the status that the process ends with.
    """

    def __init__(self, checkpoint: Path, step: int, by: str) -> None:
        super().__init__(EXIT_STATUS)
        self.checkpoint, self.step, self.by = checkpoint, step, by

    def __str__(self) -> str:
        return (
            f"{self.by}: training was ended after step {self.step} and saved in {self.checkpoint}; "
            "train(resume_from_checkpoint=True) goes on from there"
        )


class Asked(Exception):
    """Raised where training can be left, once a signal has asked for it."""


def agree(asked: bool) -> bool:
    """Return whether to leave, the same on all processes; a single one has nobody to ask."""
    return asked


@define(eq=False)
class Interruption:
    """The signals of one training; a context in which they are watched for.

    Attributes:
        enabled: whether signals ask for a checkpoint (``enable_jit_checkpoint``).
        agree: decides over all processes, called at the same places on each.
        unfinished: switches of the control that were on when the checkpoint resumed from was saved.
        saved_step: the step of the last checkpoint of this training.
        received: the signal that came.
        whole: a context that ``KeyboardInterrupt`` does not enter.
    """

    enabled: bool
    agree: Callable[[bool], bool] = agree
    unfinished: tuple[str, ...] = ()
    saved_step: int | None = None
    received: signal.Signals | None = None
    whole: "Whole" = field(factory=lambda: Whole(), init=False)
    _event: Event = field(default=Event.TRAIN_BEGIN, init=False)
    _previous: dict[Any, Any] = field(factory=dict, init=False)
    _left: bool = field(default=False, init=False)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            if self.enabled:
                logger.warning(
                    "enable_jit_checkpoint has no effect: train() was not called in the main thread, "
                    "where signals arrive."
                )
        elif self.enabled:
            for number in _ASKING:
                self._install(number, self._ask)
        elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._install(signal.SIGINT, self.whole.interrupt)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self.received is not None and not self._left:  # too late to be noticed, but not ignored
            os.kill(os.getpid(), self.received)

    def now(self, event: Event) -> None:
        """Note the event that is being reacted to."""
        self._event = event

    def check(self, trainer: Any) -> None:
        """Raise ``Asked`` if a signal asked to leave and this is a place to do so."""
        if self.enabled and self._may_leave(trainer) and self.agree(self.received is not None):
            raise Asked

    def excuses(self, error: Exception) -> bool:
        """Tell whether an error may be due to the signal: workers that load data got it as well."""
        reading = self._event in (Event.EPOCH_BEGIN, Event.STEP_END)
        if self.received is None or not reading:
            return False
        logger.warning("After %s, fetching data failed: %s", self.received.name, error)
        return True

    def leave(self, trainer: Any, run: Run, save: Callable[[], None]) -> NoReturn:
        """Save, unless this very step has been saved and nothing is left to do for it; then leave.

        Raises:
            TrainingInterrupted: when the checkpoint is safe.
            CheckpointError: if it could not be saved.
        """
        self._left = True
        name = "a signal" if self.received is None else self.received.name
        step, control = run.state.step, trainer.control
        # What a checkpoint left over, and nobody has come to yet, stays.
        self.unfinished += tuple(switch for switch in _SWITCHES if getattr(control, switch))
        if control.should_training_stop and not run.finished:
            self.unfinished += ("should_training_stop",)
        if self.unfinished or self.saved_step != step:
            logger.warning("%s: saving a checkpoint of step %d and leaving", name, step)
            save()
        if trainer._writer is not None:
            trainer._writer.close()
        folder = checkpoint_dir(trainer._get_output_dir(trial=None), step)
        done = TrainingInterrupted(folder, step, name)
        logger.warning("%s", done)
        raise done from None

    def resume(self, trainer: Any) -> bool:
        """Switch on what was left to do when the checkpoint was saved; returns whether there is any."""
        unfinished, self.unfinished = self.unfinished, ()
        for switch in unfinished:
            setattr(trainer.control, switch, True)
        return bool(unfinished)

    @contextmanager
    def breaking_off(self, trainer: Any) -> Iterator[None]:
        """Let evaluations inside end at the batch at which a signal asks for it."""
        callback, callbacks = _BreakOff(self, trainer), trainer.callback_handler.callbacks
        if self.enabled:
            callbacks.append(callback)
        try:
            yield
        finally:
            if callback in callbacks:
                callbacks.remove(callback)

    def _may_leave(self, trainer: Any) -> bool:
        # If this step ends the epoch or training early, the epoch's end follows at once.
        control, run = trainer.control, trainer._run
        stops = control.should_epoch_stop or (control.should_training_stop and not run.finished)
        return self._event is not Event.STEP_END or not stops

    def _install(self, number: signal.Signals, handler: Any) -> None:
        previous = signal.getsignal(number)
        if previous is not None:  # else it is not Python's, and could not be put back
            self._previous[number] = previous
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for other in _ASKING:
            signal.signal(other, signal.SIG_DFL)  # the next one ends the process at once
        if hasattr(signal, "SIGCHLD"):
            # PyTorch raises from this one, wherever training is, if workers of a loader have died.
            self._install(signal.SIGCHLD, signal.SIG_DFL)


class Whole:
    """A context that is left before ``KeyboardInterrupt`` is raised; costs a microsecond."""

    def __init__(self) -> None:
        self._inside = self._late = False

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(self, *exception: Any) -> None:
        self._inside = False
        if self._late:
            self._late = False
            raise KeyboardInterrupt

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        if not self._inside:
            raise KeyboardInterrupt
        self._late = True


class _BreakOff(TrainerCallback):
    def __init__(self, interruption: Interruption, trainer: Any) -> None:
        self._interruption, self._trainer = interruption, trainer

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._interruption.check(self._trainer)
