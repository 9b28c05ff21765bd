"""Folders with Hugging Face's file names: what can be told without opening a pickle."""

import json
import math
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import TRAIN_STATE, TRAINER_STATE
from trainer.checkpoint.tensors import read_index
from trainer.cli.result import Refusal

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_KNOWN = (TRAINER_STATE, "config.json", "training_args.bin", "adapter_config.json")


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder looks like a checkpoint or a model that another trainer saved."""
    if (folder / TRAIN_STATE).exists():  # ours, without its manifest
        return False
    return any((folder / name).exists() for name in _KNOWN) or bool(
        list(folder.glob("*.safetensors"))
    )


def survey(folder: Path) -> dict[str, Any]:
    """Return what the folder's JSON files and the headers of its safetensors say.

    Raises:
        Refusal: naming a file that cannot be read.
    """
    trainer_state, config = _json(folder / TRAINER_STATE), _json(folder / "config.json")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    leaves = [leaf for file in files for leaf in _tensors(folder, file)]
    pickles = [file.relative_to(folder).as_posix() for file in files if _is_pickle(file)]
    weights = [leaf["numel"] for leaf in leaves]
    return {
        "format": "hf",
        "step": trainer_state.get("global_step"),
        "max_steps": trainer_state.get("max_steps"),
        "epoch": trainer_state.get("epoch"),
        "world_size": len(list(folder.glob("rng_state*.pth"))) or None,
        "parameters": sum(weights) if weights else None,
        "model": {
            "type": config.get("model_type"),
            "architectures": config.get("architectures"),
        },
        "versions": {"transformers": config.get("transformers_version")},
        "best": {
            "checkpoint": trainer_state.get("best_model_checkpoint"),
            "metric": trainer_state.get("best_metric"),
        },
        "files": [
            {"name": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
            for file in files
        ],
        "leaves": leaves,
        "not_opened": pickles,
    }


def _tensors(folder: Path, file: Path) -> list[dict[str, Any]]:
    if file.suffix != ".safetensors":
        return []
    try:
        entries, _ = read_index(file)
    except ValueError as error:
        raise Refusal(f"{file}: {error}") from None
    return [
        {
            "path": entry.name,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "numel": math.prod(entry.shape),
            "nbytes": entry.size,
            "file": file.relative_to(folder).as_posix(),
        }
        for entry in entries
    ]


def _is_pickle(file: Path) -> bool:
    return file.suffix in _PICKLES


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise Refusal(f"{file}: not a JSON object: {error}") from None
