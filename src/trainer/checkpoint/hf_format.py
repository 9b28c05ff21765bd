"""The files that the Hugging Face Trainer writes and reads, and what goes into them.

With ``checkpoint_format="hf"`` a checkpoint has these files in place of ``optimizer.safetensors``. Our own
small files are written as well: what the Hugging Face Trainer has no place for (position of the data,
extras of the state, digests) is not lost, and the checkpoint is verified and resumed as exactly as any.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from trainer.checkpoint.layout import (
    ARGUMENTS,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
)

OPTIMIZER_PT = "optimizer.pt"
SCHEDULER_PT = "scheduler.pt"
SCALER_PT = "scaler.pt"
RNG_PTH = "rng_state.pth"
ARGUMENTS_BIN = "training_args.bin"
MODEL = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"
"""What the Hugging Face Trainer puts into a folder while it saves on a signal."""


def rng_name(rank: int, world_size: int) -> str:
    """Return the name of the file with a process's random state."""
    return RNG_PTH if world_size == 1 else f"rng_state_{rank}.pth"


def is_foreign(path: Path) -> bool:
    """Tell whether a folder was written by the Hugging Face Trainer rather than by this package."""
    if any((path / name).exists() for name in (MANIFEST, TRAIN_STATE, ARGUMENTS, OPTIMIZER)):
        return False  # ours, perhaps without its manifest
    return any((path / name).exists() for name in (TRAINER_STATE, OPTIMIZER_PT, ARGUMENTS_BIN))


@frozen(eq=False)
class HfParts:
    """What a checkpoint in this format holds beside the model, the state and the random state.

    Attributes:
        arguments: the object for ``training_args.bin``, without secrets; a pickle that only others open.
        optimizer: ``state_dict()`` of the torch optimizer, whose tensors are leaves of the state; None if
            only the model is saved.
        scheduler: ``state_dict()`` of the scheduler.
        scaler: ``state_dict()`` of the ``GradScaler`` that stands for the loss scale; None without one.
    """

    arguments: Any
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    def map(self, call: Callable[[Any], Any]) -> "HfParts":
        """Return a copy with ``call`` applied to all that is no dict, list or tuple."""
        return evolve(
            self,
            optimizer=_map(call, self.optimizer),
            scheduler=_map(call, self.scheduler),
            scaler=_map(call, self.scaler),
        )


@frozen(eq=False)
class Foreign:
    """What was read from a checkpoint of the Hugging Face Trainer, beside the weights.

    Attributes:
        optimizer: ``state_dict()`` of its optimizer; None if only the model was saved.
        scheduler: that of its scheduler.
        scaler: that of its ``GradScaler``; None without one.
    """

    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    scaler: dict[str, Any] | None


def plain_tensor(value: Any) -> Any:
    """Return a tensor as one on the host with no more memory than it needs; others as they are."""
    if not isinstance(value, Tensor):
        return value
    host = value.detach().cpu()
    whole = host.untyped_storage().nbytes() == host.numel() * host.element_size()
    return host if whole else host.clone(memory_format=torch.preserve_format)


def _map(call: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(call, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_map(call, inner) for inner in value)
    return call(value)
