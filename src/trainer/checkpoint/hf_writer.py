"""Writing the files of ``trainer.checkpoint.hf_format``."""

from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import Hashing, Workers, host_tensor
from trainer.checkpoint.hf_format import (
    ARGUMENTS_BIN,
    OPTIMIZER_PT,
    SCALER_PT,
    SCHEDULER_PT,
    HfParts,
    plain_tensor,
    rng_name,
)
from trainer.checkpoint.host_rng import as_objects
from trainer.checkpoint.weights import Stored


def take_leaves(
    parts: HfParts, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing
) -> dict[str, Tensor]:
    """Note and digest the leaves that ``optimizer.pt`` will hold; return the others."""
    places = {
        _view(value): f"{index}/{key}"
        for index, kept in (parts.optimizer or {"state": {}})["state"].items()
        if isinstance(kept, dict)
        for key, value in kept.items()
        if isinstance(value, Tensor) and value.numel()
    }
    others = {}
    for path, leaf in leaves.items():
        name = places.get(_view(leaf))
        if name is None:
            others[path] = leaf
        else:
            stored.where[path] = (OPTIMIZER_PT, name)
            hashing.leaf(path, host_tensor(leaf))
    return others


def write_parts(
    folder: Path,
    parts: HfParts,
    host_rng: dict[int, dict[str, Any]],
    world_size: int,
    stored: Stored,
    hashing: Hashing,
    syncing: Workers,
) -> None:
    """Write the files; what the model's own ``save_model`` left as ``training_args.bin`` stays."""
    contents: dict[str, Any] = {
        OPTIMIZER_PT: parts.map(plain_tensor).optimizer,
        SCHEDULER_PT: parts.scheduler,
        SCALER_PT: parts.scaler,
    }
    for rank, state in host_rng.items():
        contents[rng_name(rank, world_size)] = _random_state(state, world_size)
    if not (folder / ARGUMENTS_BIN).exists():
        contents[ARGUMENTS_BIN] = parts.arguments
    for name, value in contents.items():
        if value is None:
            continue
        with io.create(folder / name) as file:
            _Sink(file).take(value)
        syncing.put(io.sync_file, folder / name)
        stored.shas[name] = hashing.file(folder / name)


class _Sink:
    """A file for ``torch.save`` whose writes go the way of all others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._failure: BaseException | None = None

    def take(self, value: Any) -> None:
        """Write a value; raises what a write raised, not what PyTorch makes of it."""
        try:
            torch.save(value, cast("IO[bytes]", self))
        except BaseException:
            if self._failure is not None:
                raise self._failure from None
            raise

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        try:
            io.write(self._file, data)
        except BaseException as error:
            self._failure = error
            raise
        return len(data)

    def flush(self) -> None:
        """Do nothing: the file is synced when it is closed."""


def _random_state(state: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Return what the Hugging Face Trainer keeps of a process's random state."""
    objects = as_objects(state)
    name, key, *rest = objects["numpy"]
    found = {
        "python": objects["python"],
        "numpy": (name, np.asarray(key, np.uint32), *rest),
        "cpu": objects["torch"],
    }
    if devices := objects.get("cuda"):
        # One process keeps the state of its current device only.
        found["cuda"] = devices if world_size > 1 else devices[torch.cuda.current_device()]
    return found


def _view(tensor: Tensor) -> Any:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
