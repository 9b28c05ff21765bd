"""Records of the loss: written when they are due, or a step later so that a GPU need not wait for it.

Reading the loss waits until the device has done the step. Where steps are recorded in CUDA graphs, the
device would then idle until the host has written the record and handed it the next step. So the numbers
are sent to the host, and the record is written as soon as the next step is under way: the same record,
with the step and the epoch that it belongs to.
"""

from contextlib import suppress
from typing import Any

from trainer.checks import takes
from trainer.facade.output import OutputMixin
from trainer.loop import Event, Run
from trainer.meter import Meter

# Where a callback could tell that a record is not there yet.
_BETWEEN = ("on_log", "on_step_begin", "on_substep_end", "on_pre_optimizer_step")


class Records:
    """Writes the records of one training; a context that none is left behind in.

    Args:
        trainer: whose ``log`` is called.
        run: the training.
        meter: where the loss is.
        late: whether records may come a step later, where nobody can tell.
    """

    def __init__(self, trainer: Any, run: Run, meter: Meter, *, late: bool) -> None:
        self._trainer, self._run, self._meter = trainer, run, meter
        self._late = late
        self._timed = takes(trainer.log, "start_time")  # overrides may be written log(self, logs)
        self._left: int | None = None

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception: Any) -> None:
        with suppress(Exception):  # a device that failed has no numbers; its error is on its way
            self.catch_up()

    def due(self, event: Event) -> None:
        """Write the record that is due after ``event``, or leave it until the next step is under way."""
        if self._meter.joins:  # several processes: losses and counts travel in one message
            loss = self._meter.read(self._run.state.step)
            self._trainer._counts_are_in = True
            try:
                self._trainer.store_flos()
            finally:
                self._trainer._counts_are_in = False
            self._log(loss)
            return
        self._trainer.store_flos()
        if self._late and event is Event.STEP_END and self._unnoticed():
            self._meter.send()
            self._left = self._run.state.step
            self._trainer.control.should_log = False
        else:
            self._write(self._run.state.step)

    def catch_up(self) -> None:
        """Write the record that was left, if there is one."""
        if self._left is not None:
            step, self._left = self._left, None
            self._write(step)

    def _write(self, step: int) -> None:
        self._log(self._meter.read(step))

    def _log(self, loss: float) -> None:
        trainer, meter = self._trainer, self._meter
        logs = {"loss": loss, **meter.latest}
        if trainer._figures is not None:
            logs |= trainer._figures.take()
        if self._timed:
            trainer.log(logs, meter.started)
        else:
            trainer.log(logs)

    def _unnoticed(self) -> bool:
        """Whether a step goes on after this one, and nothing but the record tells of this one."""
        trainer, control = self._trainer, self._trainer.control
        counting = trainer._figures is not None or trainer._tokens.how != "no"
        stopping = control.should_training_stop or control.should_epoch_stop
        reading = control.should_evaluate or control.should_save
        if counting or stopping or reading:
            return False
        own_log = getattr(trainer.log, "__func__", None) is OutputMixin.log
        listening = trainer.callback_handler.has_foreign_listeners
        return own_log and not any(map(listening, _BETWEEN))
