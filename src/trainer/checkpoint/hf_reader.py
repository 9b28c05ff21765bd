"""Reading the files of ``trainer.checkpoint.hf_format``, of this package or of the Hugging Face Trainer.

Nothing is unpickled but tensors, numbers, strings and containers of them (``weights_only=True``), and what
NumPy needs for its random state; ``training_args.bin``, which holds an object, is never opened.
"""

import json
import pickle
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import host_rng
from trainer.checkpoint.hf_format import (
    INCOMPLETE,
    MODEL,
    MODEL_INDEX,
    OPTIMIZER_PT,
    SCALER_PT,
    SCHEDULER_PT,
    Foreign,
)
from trainer.checkpoint.layout import TRAINER_STATE, step_of
from trainer.checkpoint.tensors import read_index

_STATES = (OPTIMIZER_PT, SCHEDULER_PT)
_RNG_GLOB = "rng_state*.pth"


def optimizer_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an ``optimizer.pt`` under ``<index>/<key>``.

    Raises:
        ValueError: if the file holds something else.
    """
    state = read_pickle(path)["state"]
    return {
        f"{index}/{key}": value
        for index, kept in state.items()
        for key, value in kept.items()
        if isinstance(value, Tensor)
    }


def read_pickle(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is harmless; tensors on the host.

    Raises:
        ValueError: if it is damaged, or holds objects that are not allowed.
    """
    core = np._core if hasattr(np, "_core") else np.core
    allowed = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with ExitStack() as stack:
        stack.enter_context(torch.serialization.safe_globals(allowed))
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path.name}: it cannot be read: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the model's weights: one, or those that the index of the shards names.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the index is damaged.
    """
    if (folder / MODEL).exists():
        return [folder / MODEL]
    if not (folder / MODEL_INDEX).exists():
        raise FileNotFoundError(f"{folder}: neither {MODEL} nor {MODEL_INDEX}")
    try:
        names = json.loads((folder / MODEL_INDEX).read_bytes())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MODEL_INDEX}: it is damaged: {error!r}") from None


def problems(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint of the Hugging Face Trainer, as far as can be told.

    There is no manifest. It is checked that all files are there, that headers of weights fit the files'
    sizes, that the pickles' archives are whole and their checksums right, and that the folder is named
    after the step. Changed weights cannot be noticed.
    """
    found = _weights_problems(path) + _state_problems(path)
    if (path / INCOMPLETE).exists():
        found.append(f"{INCOMPLETE}: the save was cut off")
    names = [name for name in (*_STATES, SCALER_PT) if (path / name).exists()]
    random_states = sorted(file.name for file in path.glob(_RNG_GLOB))
    for name in [*names, *random_states]:
        found += _archive_problems(path / name)
    # Both are saved along with the random state, or none is (save_only_model).
    if names or random_states:
        expected = [*_STATES, *([] if random_states else [_RNG_GLOB])]
        found += [f"{name}: missing" for name in expected if name not in names]
    return found


def read_foreign(path: Path) -> tuple[Foreign, dict[int, dict[str, Any]], int]:
    """Return what a verified checkpoint holds: states, random states by rank, and the step.

    Raises:
        ValueError: if a file holds something that is not allowed.
    """
    states = {
        name: read_pickle(path / name) for name in (*_STATES, SCALER_PT) if (path / name).exists()
    }
    random_states = {
        int(file.stem.removeprefix("rng_state").strip("_") or 0): _host_rng(read_pickle(file))
        for file in path.glob(_RNG_GLOB)
    }
    foreign = Foreign(*(states.get(name) for name in (*_STATES, SCALER_PT)))
    step = json.loads((path / TRAINER_STATE).read_bytes())["global_step"]
    return foreign, random_states, step


def _weights_problems(path: Path) -> list[str]:
    try:
        files = weight_files(path)
    except FileNotFoundError:
        return [f"{MODEL}: missing; weights in other formats are not read"]
    except (ValueError, OSError) as error:
        return [str(error)]
    found = []
    for file in files:
        try:
            read_index(file)
        except FileNotFoundError:
            found.append(f"{file.name}: missing")
        except (ValueError, OSError) as error:
            found.append(f"{file.name}: it cannot be read: {error}")
    return found


def _state_problems(path: Path) -> list[str]:
    try:
        step = json.loads((path / TRAINER_STATE).read_bytes())["global_step"]
    except FileNotFoundError:
        return [f"{TRAINER_STATE}: missing; it is written last, so the save was cut off"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{TRAINER_STATE}: it cannot be read: {error!r}"]
    named = step_of(path)
    if named not in (None, step):
        return [f"{path.name}: it holds step {step}; the folder was renamed"]
    return []


def _archive_problems(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return [f"{file.name}: it cannot be read: {error}"]
    return [] if bad is None else [f"{file.name}: the checksum of {bad} does not fit"]


def _host_rng(state: dict[str, Any]) -> dict[str, Any]:
    """Return a random state in the form of ``trainer.checkpoint.host_rng``."""
    objects = {"python": state["python"], "numpy": state["numpy"], "torch": state["cpu"]}
    if (devices := state.get("cuda")) is not None:
        objects["cuda"] = [devices] if isinstance(devices, Tensor) else devices
    return host_rng.as_json(objects)
