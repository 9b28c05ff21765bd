"""Names: what the files of a checkpoint are called, and which folders count as checkpoints.

Beside ``checkpoint-<step>`` three kinds of hidden folders can be seen, each named after the process
that made it: ``.tmp-`` is being written, ``.old-`` was set aside while a checkpoint of the same step
is replaced, ``.gone-`` is being deleted. Only ``.old-`` ever holds the sole copy of something.
"""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

OPTIMIZER = "optimizer.safetensors"
PARTIAL = ".optimizer.safetensors"
"""What the optimizer's file is called until ``write_model`` is done."""
WEIGHTS = "weights.safetensors"
"""Weights that the model's own files lack; most checkpoints have none."""
EXTRAS = "extras.safetensors"
"""With Hugging Face's file names: leaves that ``optimizer.pt`` has no place for; most have none."""
TRAIN_STATE = "train_state.json"
TRAINER_STATE = "trainer_state.json"
ARGUMENTS = "training_args.json"
MANIFEST = "manifest.json"
DEEPSPEED = "deepspeed"
"""Key in a checkpoint's position if DeepSpeed saved the state, with what the engine needs to go on."""

PREFIX_CHECKPOINT_DIR = "checkpoint"

# What the libraries write beside weights for whoever loads the model later, and people may edit.
_DESCRIPTIONS = (
    *(
        "config.json",
        "generation_config.json",
        "*processor_config.json",
        "feature_extractor_config.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "*.bpe.model"),
    *("chat_template.*", "additional_chat_templates/*", "*.md", "LICENSE*"),
)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", re.ASCII)
_SIBLING = re.compile(r"\.(tmp|old|gone)-checkpoint-(\d+)-(\d+)", re.ASCII)
_HOST_RNG = re.compile(r"host_rng-(\d+)\.json", re.ASCII)


class Sibling(NamedTuple):
    """A hidden folder beside the checkpoints: its kind, the step it is of, the process it is of."""

    path: Path
    kind: str
    step: int
    pid: int


def checkpoint_dir(root: str | os.PathLike[str], step: int) -> Path:
    """Return where the checkpoint of ``step`` lies."""
    return Path(root) / f"checkpoint-{step}"


def sibling_dir(root: Path, kind: str, step: int) -> Path:
    """Return the hidden folder of this process for ``step``; ``kind`` is tmp, old or gone."""
    return root / f".{kind}-checkpoint-{step}-{os.getpid()}"


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name; None for any other name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def host_rng_name(rank: int) -> str:
    """Return the name of the file with one process's random state."""
    return f"host_rng-{rank}.json"


def host_rng_rank(name: str) -> int | None:
    """Return the rank in such a name; None for any other name."""
    match = _HOST_RNG.fullmatch(name)
    return int(match[1]) if match else None


def only_describes(name: str) -> bool:
    """Tell whether a file only describes the model: a training that goes on reads nothing of it."""
    return any(fnmatchcase(name, pattern) for pattern in _DESCRIPTIONS)


def list_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """Return the folders named ``checkpoint-<step>`` in ``root``, by ascending step.

    Whether they are complete is not asked: ``newest`` and ``verify`` answer that. Folders that are
    being written or deleted have other names and are never listed. No ``root``, no checkpoints.
    """
    found = [(step, path) for path in _folders(Path(root)) if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def siblings(root: Path) -> list[Sibling]:
    """Return the hidden folders in ``root``, of this and of other processes, ordered by name."""
    matches = ((path, _SIBLING.fullmatch(path.name)) for path in _folders(root))
    return sorted(Sibling(p, m[1], int(m[2]), int(m[3])) for p, m in matches if m)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir()]
