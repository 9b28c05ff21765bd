"""Small things to train through ``Trainer``: models that return a loss, data, callbacks that watch."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import IterableDataset

import trainstep as ts
from support import models
from trainer import Trainer, TrainerCallback, TrainingArguments

TIMED = ("_runtime", "_per_second")
"""Ends of the names of metrics that depend on the clock."""


class Scored(nn.Module):
    """A module of ``support.models`` that takes labels and returns ``{"loss", "logits"}``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": mse_loss(logits, labels), "logits": logits}


class Watching(Scored):
    """Keeps what it was trained on, batch by batch."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.seen.append(x[:, 0].tolist())
        return super().forward(x, labels)


def flat(batches: Iterable[Iterable[float]]) -> list[float]:
    """Join what a ``Watching`` has seen."""
    return [value for batch in batches for value in batch]


class Normed(nn.Module):
    """A layer norm between two linear layers, so that some parameters are not decayed."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(models.IN, models.HIDDEN)
        self.norm = nn.LayerNorm(models.HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(models.HIDDEN, models.OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).tanh()))


def scored(
    name: str | Callable[[], nn.Module] = "dropout", kind: type[Scored] = Scored, seed: int = 0
) -> Scored:
    """Make a model around one of ``support.models``, by name, or around what a callable makes."""
    if isinstance(name, str):
        return kind(models.build(name, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(name())


def samples(n: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make ``n`` samples: ``x`` (4,) and ``labels`` (2,)."""
    data = models.batch(n, seed=seed)
    return [{"x": x, "labels": y} for x, y in zip(data["x"], data["y"], strict=True)]


class Stream(IterableDataset):
    """Samples without a length; each pass gives those that ``passes`` tells, the last one for ever."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)
        self.begun = 0

    def __iter__(self) -> Iterator[Any]:
        chosen = self.passes[min(self.begun, len(self.passes) - 1)]
        self.begun += 1
        return iter(chosen)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Options for a quick and quiet training on the CPU: batches of 2, nothing saved."""
    quiet: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return quiet | changes


def make_args(folder: Path, **changes: Any) -> TrainingArguments:
    """Make training arguments of ``options``."""
    return TrainingArguments(**options(folder, **changes))


def make_trainer(
    folder: Path,
    model: Any = None,
    *,
    train: Any = None,
    evaluation: Any = None,
    callbacks: Iterable[Any] = (),
    make: Callable[..., Any] = Trainer,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A Trainer on 10 samples.

    Args:
        folder: output folder.
        model: None makes one with dropout.
        train: training data; None makes 10 samples.
        evaluation: evaluation data; None makes 5 samples.
        callbacks: more of them.
        make: the class of the trainer.
        more: further arguments of the trainer.
        changes: of the training arguments.
    """
    return make(
        scored() if model is None else model,
        make_args(folder, **changes),
        train_dataset=samples() if train is None else train,
        eval_dataset=samples(5, seed=1) if evaluation is None else evaluation,
        callbacks=list(callbacks),
        **(more or {}),
    )


class Recorder(TrainerCallback):
    """Notes every event, with step and epoch at the end of steps."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            event: Any = name.removeprefix("on_")
            if event == "step_end":
                event = (event, state.global_step, round(state.epoch, 6))
            elif event == "log":
                kinds = {"loss": "train", "train_loss": "final"}
                event = (event, next((kinds[k] for k in kinds if k in kwargs["logs"]), "eval"))
            self.events.append(event)

        return note


class At(TrainerCallback):
    """Calls ``action(control)`` at an event of one step, once."""

    def __init__(self, event: str, step: int, action: Callable[[Any], Any]) -> None:
        waiting = [action]

        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and waiting:
                waiting.pop()(control)

        setattr(self, f"on_{event}", act)


class Killed(Exception):
    """The process would have ended here."""


def kill(control: Any) -> None:
    """For ``At``: end the training as a crash does."""
    raise Killed


def stop(control: Any) -> None:
    """For ``At``: end the training in good order."""
    control.should_training_stop = True


def timeless(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return log records without what depends on the clock."""
    return [{k: v for k, v in record.items() if not k.endswith(TIMED)} for record in history]


def outcome(trainer: Any, result: Any) -> tuple[Any, ...]:
    """Return all that must be equal after resuming: state, records, mean loss, steps, epoch."""
    return (
        ts.digest(trainer.train_state),
        timeless(trainer.state.log_history),
        result.training_loss,
        result.global_step,
        trainer.state.epoch,
    )


def scripted(values: Iterable[float]) -> Callable[[Any], dict[str, float]]:
    """Return a ``compute_metrics`` that gives one value after the other as ``score``."""
    rest = iter(values)
    return lambda prediction: {"score": next(rest)}


def logged(trainer: Any, key: str) -> list[Any]:
    """Return the values of ``key`` in the log history."""
    return [record[key] for record in trainer.state.log_history if key in record]


def weights(trainer: Any) -> dict[str, Tensor]:
    """Return copies of a trainer's model's weights and buffers."""
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}
