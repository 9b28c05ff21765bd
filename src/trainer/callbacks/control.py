"""The switches through which callbacks steer the training loop."""

from __future__ import annotations

import dataclasses
from typing import Any

from .base import ExportableState


@dataclasses.dataclass
class TrainerControl(ExportableState):
    """What the training loop is asked to do next.

    Attributes:
        should_training_stop: Leave training. Reset when training begins.
        should_epoch_stop: Leave this epoch and go on with the next. Reset when an epoch begins.
        should_save: Write a checkpoint now. Reset by the save and when a step begins.
        should_evaluate: Evaluate now. Reset by the evaluation and when a step begins.
        should_log: Log now. Reset by the log and when a step begins.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def _new_training(self) -> None:
        """Reset what lasts for a training."""
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        """Reset what lasts for an epoch."""
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        """Reset what lasts for a step."""
        self.should_save = False
        self.should_evaluate = False
        self.should_log = False

    def state(self) -> dict[str, Any]:
        """Return the switches in the form that a checkpoint stores."""
        return {"args": dataclasses.asdict(self), "attributes": {}}
