"""Running a training again from a checkpoint: what ``trainstep replay`` does to a script's Trainer.

While a ``Replay`` is active, the first ``Trainer.train`` in this process resumes from its checkpoint in
another output folder, without saving, evaluating and trackers, and ends the script after some steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from attrs import define, field

from trainer import digest_log
from trainer.callbacks import TrainerCallback


class ReplayDone(BaseException):
    """Ends the script that was replayed. No ``Exception``, so that scripts do not handle it."""


@define(eq=False)
class Replay:
    """What to do, and then what came out.

    Attributes:
        checkpoint: where to resume.
        steps: updates to make from there.
        output_dir: replaces the output folder of every ``TrainingArguments`` given to a Trainer.
        evaluate: evaluate when the run did; its results then steer training as they did.
        lines: the entry of ``digest_log`` for each step, from the checkpoint's on.
        leaves: the digests of the state's leaves for each step.
        arguments: those of the Trainer, as a checkpoint would hold them.
        done: whether it is over.
    """

    checkpoint: Path
    steps: int
    output_dir: Path
    evaluate: bool = False
    lines: dict[int, dict[str, Any]] = field(factory=dict)
    leaves: dict[int, dict[str, str]] = field(factory=dict)
    arguments: dict[str, Any] = field(factory=dict)
    done: bool = False

    def note(self, trainer: Any) -> None:
        """Take down the state as it is now."""
        leaves = digest_log.leaves(trainer)
        step = trainer._run.state.step
        self.leaves[step], self.lines[step] = leaves, digest_log.entry(trainer, leaves)

    def end(self) -> NoReturn:
        """End the script."""
        self.done = True
        raise ReplayDone


_active: Replay | None = None  # of the process, not of a context: scripts may train in a thread


@contextmanager
def replaying(replay: Replay) -> Iterator[None]:
    """Let the Trainers made in this context take part in ``replay``."""
    global _active
    before, _active = _active, replay
    try:
        yield
    finally:
        _active = before


def redirect(args: Any) -> None:
    """Turn the arguments of a Trainer in the making away from the run that is replayed.

    They are changed in place: scripts write other files below ``args.output_dir``.
    """
    if _active is not None:
        args.output_dir = str(_active.output_dir)
        args.report_to, args.push_to_hub, args.log_digest_steps = [], False, 0


def start(trainer: Any, wanted: Any) -> Any:
    """Return what ``train`` is to resume from: ``wanted``, or the checkpoint that is replayed."""
    if _active is None:
        return wanted
    if _active.done:  # by a script that goes on after anything
        raise ReplayDone
    trainer.add_callback(_Watch(_active, trainer))
    return str(_active.checkpoint)


class _Watch(TrainerCallback):
    """The last of the callbacks: sees what the others did, and takes back what a replay must not do."""

    def __init__(self, replay: Replay, trainer: Any) -> None:
        self._replay, self._trainer = replay, trainer
        self._last = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where it begins."""
        self._replay.arguments = args.to_sanitized_dict()
        self._replay.note(self._trainer)
        self._last = state.global_step + self._replay.steps
        args.eval_on_start = False  # it was done before the checkpoint
        args.save_strategy, args.load_best_model_at_end = "no", False  # nor save what is the best

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the state after an update, and end after the last one."""
        self._replay.note(self._trainer)
        if state.global_step >= self._last:
            self._replay.end()
        self._restrain(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save nothing at the end of an epoch, either."""
        self._restrain(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the script although training was over sooner."""
        self._replay.end()

    def _restrain(self, control: Any) -> None:
        control.should_save = False
        control.should_evaluate = control.should_evaluate and self._replay.evaluate
