"""Where a training stands: progress, log history, best metric. Saved as ``trainer_state.json``."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .export import export_states
from .jsonable import to_jsonable

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"

StrPath = str | os.PathLike[str]


@dataclasses.dataclass
class TrainerState:
    """The progress of a training, as callbacks see it and as checkpoints keep it.

    A "step" is one update of the weights, whatever number of micro-batches it took.

    Attributes:
        epoch: Epochs done, as a fraction.
        global_step: Steps done.
        max_steps: Steps planned.
        logging_steps: Steps from one log to the next.
        eval_steps: Steps from one evaluation to the next.
        save_steps: Steps from one checkpoint to the next.
        train_batch_size: Samples a process takes per micro-batch.
        num_train_epochs: Epochs planned, rounded up.
        num_input_tokens_seen: Input tokens so far, over all processes.
        total_flos: Floating-point operations so far, an estimate.
        log_history: Every log record, each with its ``step``.
        best_metric: Best value of ``metric_for_best_model`` so far.
        best_global_step: Step at which it was reached.
        best_model_checkpoint: Folder of that checkpoint.
        is_local_process_zero: This is the main process of its node.
        is_world_process_zero: This is the main process of all.
        is_hyper_param_search: This training is a trial of a search.
        trial_name: Name of the trial.
        trial_params: Hyperparameters of the trial.
        stateful_callbacks: Class name -> exported state (a list where a class has several). A list
            of `ExportableState` objects may be given; it is exported at once.
    """

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    # None stands for an empty list or dict, also in files.
    log_history: list[dict[str, Any]] = None  # type: ignore[assignment]
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None
    stateful_callbacks: dict[str, Any] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.log_history is None:
            self.log_history = []
        if self.stateful_callbacks is None:
            self.stateful_callbacks = {}
        elif not isinstance(self.stateful_callbacks, Mapping):
            self.stateful_callbacks = export_states(self.stateful_callbacks)

    def save_to_json(self, json_path: StrPath) -> None:
        """Write the state: 2 spaces of indentation, sorted keys, a final newline.

        The file is complete or not there: it is written beside `json_path` and moved over it.
        """
        _write_atomically(json_path, self.to_json())

    def to_json(self) -> str:
        """Return the text that `save_to_json` writes."""
        values = {f.name: to_jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_from_json(cls, json_path: StrPath) -> Self:
        """Read a state that `save_to_json` (or transformers) wrote.

        Keys that this class does not have are dropped with a warning that names them.

        Raises:
            ValueError: The file does not hold a JSON object.
        """
        with open(json_path, encoding="utf-8") as file:
            return cls.from_json(file.read(), os.fspath(json_path))

    @classmethod
    def from_json(cls, text: str, source: str = TRAINER_STATE_NAME) -> Self:
        """Read a state from text, as `load_from_json` does; ``source`` names it in messages."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source} is not valid JSON ({error}); it may have been cut off "
                "while it was written. Use another checkpoint."
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            logger.warning(
                "%s has keys that %s does not know: %s. They are ignored.",
                source,
                cls.__name__,
                ", ".join(unknown),
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Take the log, evaluation and save intervals from `args`.

        An interval below 1 is a share of `max_steps` and becomes ``ceil(max_steps * share)``
        steps; None keeps the interval that is set.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(args, name)
            if steps is not None:
                setattr(self, name, math.ceil(max_steps * steps) if steps < 1 else steps)

    def init_training_references(
        self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any
    ) -> None:
        """Take up what belongs to this process and this training, whatever a checkpoint says.

        Args:
            trainer: Object with ``is_local_process_zero()`` and ``is_world_process_zero()``; its
                ``hp_name`` names ``_trial`` if it has both.
            max_steps: Steps planned.
            num_train_epochs: Epochs planned.
            trial: Trial of a search: a mapping, an object with ``params``, or None.

        Raises:
            TypeError: `trial` is none of these.
        """
        hp_name, own_trial = getattr(trainer, "hp_name", None), getattr(trainer, "_trial", None)
        if hp_name is not None and own_trial is not None:
            self.trial_name = hp_name(own_trial)
        self.trial_params = None if trial is None else _trial_params(trial)
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


def _trial_params(trial: Any) -> dict[str, Any]:
    """Return the hyperparameters of a trial: optuna keeps them in ``params``, others are dicts."""
    params = trial if isinstance(trial, Mapping) else getattr(trial, "params", None)
    if not isinstance(params, Mapping):
        raise TypeError(
            "trial must be a mapping of hyperparameters or have such a mapping as `params`, "
            f"got {type(trial).__name__}"
        )
    return dict(params)


def _write_atomically(path: StrPath, text: str) -> None:
    """Write `text` to a sibling of `path`, flush it to the disk, and move it to `path`."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
