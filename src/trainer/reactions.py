"""What a run does at each event of its loop: records, callbacks, evaluations, saves."""

import logging
from collections.abc import Callable
from typing import Any

from trainer import saving
from trainer.checkpoint import CheckpointError
from trainer.figures import timed
from trainer.loop import Event, Run
from trainer.meter import Meter
from trainer.optimizers import Unfrozen

logger = logging.getLogger(__name__)

_METHODS = {event: event.value for event in Event}  # an Enum computes its values at every look


class Reactions:
    """Reacts to the events of a run: to each what comes first, then the callbacks, then what follows.

    Args:
        trainer: with its callbacks, records, rates and signals as they are for this run.
        run: the training.
        meter: adds up the losses.
        ignore_keys: of the model's outputs, what evaluations leave out.
    """

    def __init__(
        self, trainer: Any, run: Run, meter: Meter, ignore_keys: list[str] | None = None
    ) -> None:
        self._trainer, self._run, self._meter = trainer, run, meter
        self._ignore_keys = ignore_keys
        self._unfrozen = Unfrozen(trainer.model, frozenset(run.state.params))
        self._signals, self._settle = trainer._interruption, trainer._steering.settle
        self._before: dict[Event, Callable[[], Any]] = {
            Event.OPTIMIZER_STEP: self._add_metrics,
            Event.STEP_END: self._count,
            Event.EPOCH_END: self._close_epoch,
        }
        self._after: dict[Event, Callable[[], Any]] = {
            Event.TRAIN_BEGIN: self._begin,
            Event.EPOCH_BEGIN: self._unfrozen.look,
            Event.OPTIMIZER_STEP: self._advance_rates,
            Event.STEP_END: self._end_step,
            Event.EPOCH_END: self._end_epoch,
        }

    def __call__(self, event: Event) -> None:
        """React to ``event`` before the loop goes on."""
        self._signals.now(event)
        if (prepare := self._before.get(event)) is not None:
            prepare()
        trainer = self._trainer
        notify = getattr(trainer.callback_handler, _METHODS[event])
        trainer.control = self._run.control = notify(trainer.args, trainer.state, trainer.control)
        if (follow := self._after.get(event)) is not None:
            follow()

    def _add_metrics(self) -> None:
        self._trainer._records.catch_up()  # the step after the one that it tells of is under way
        self._meter.add(self._run.metrics, self._run.engine.losses())

    def _count(self) -> None:
        saving.note_failure(self._trainer)
        state = self._trainer.state
        state.global_step, state.epoch = self._run.state.step, self._run.progress

    def _close_epoch(self) -> None:
        self._trainer._records.catch_up()
        if self._run.exhausted:
            logger.warning(
                "There was no sample in the training data's iterator: training stops at step %d of %d. "
                "This is expected if an iterable dataset is shorter than max_steps asks for.",
                self._run.state.step,
                self._run.plan.max_steps,
            )

    def _begin(self) -> None:
        trainer = self._trainer
        self._settle(trainer.control)
        if trainer.args.eval_on_start:
            with timed(trainer, "evaluate"):
                trainer._evaluate(None, self._ignore_keys, skip_scheduler=True)
        if self._signals.resume(trainer):
            self._log_evaluate_save(Event.TRAIN_BEGIN)

    def _advance_rates(self) -> None:
        self._trainer._rates.advance(self._run.state.step)

    def _end_step(self) -> None:
        trainer = self._trainer
        self._settle(trainer.control)
        if trainer._digests is not None:
            trainer._digests.add(trainer)  # before the save, so that a checkpoint's line is there
        self._signals.check(trainer)
        self._log_evaluate_save(Event.STEP_END)

    def _end_epoch(self) -> None:
        self._settle(self._trainer.control)
        self._signals.check(self._trainer)
        self._log_evaluate_save(Event.EPOCH_END)

    def _log_evaluate_save(self, event: Event) -> None:
        """Do what the control's switches ask for after ``event``, in this order."""
        trainer, control = self._trainer, self._trainer.control
        if control.should_log or control.should_evaluate or control.should_save:
            self._run.verify()
        if trainer.control.should_log and self._meter.pending:
            trainer._records.due(event)
            self._unfrozen.look()
            self._settle(trainer.control)
        if trainer.control.should_evaluate:
            with timed(trainer, "evaluate"):
                metrics = trainer._evaluate(None, self._ignore_keys)
            trainer._rates.take_metric(trainer.args, metrics)
            is_best = trainer._determine_best_metric(metrics, trial=None)
            if str(trainer.args.save_strategy) == "best":
                trainer.control.should_save = is_best
            elif is_best and trainer.args.load_best_model_at_end:
                trainer.control.should_save = True  # else there would be nothing to load at the end
            self._settle(trainer.control)
        if trainer.control.should_save:
            with timed(trainer, "save"):
                _save(trainer)
            self._settle(trainer.control)
        self._run.control = trainer.control
        self._signals.check(trainer)


def _save(trainer: Any) -> None:
    """Save a checkpoint. One that fails is warned of and training goes on, unless it is the last."""
    state, control = trainer.state, trainer.control
    try:
        write_checkpoint(trainer)
    except CheckpointError as error:
        if state.global_step >= state.max_steps or control.should_training_stop:
            raise
        logger.warning(
            "Checkpoint at step %d was not saved, training goes on: %s", state.global_step, error
        )
        control.should_save = False


def write_checkpoint(trainer: Any) -> None:
    """Save a checkpoint, with what belongs into it, and tell the callbacks."""
    trainer._run.verify()
    trainer._records.catch_up()
    trainer.store_flos()
    if trainer._tokens.how != "no":
        trainer.state.num_input_tokens_seen = trainer._tokens.total
    trainer._save_checkpoint(trainer.model, None)
    trainer._interruption.saved_step = trainer.state.global_step
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
