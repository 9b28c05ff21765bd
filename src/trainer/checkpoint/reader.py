"""Reading checkpoints: every byte that is read is checked against the manifest on the way."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from trainer.checkpoint import hf_reader
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hf_format import Foreign, is_foreign
from trainer.checkpoint.layout import (
    ARGUMENTS,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
    host_rng_rank,
    list_checkpoints,
    siblings,
    step_of,
)
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.pieces import join, specs
from trainer.checkpoint.scan import Scan
from trainer.checkpoint.source import Source
from trainstep.serialize import from_flat
from trainstep.state import TrainState

logger = logging.getLogger(__name__)

_MAX_SHOWN = 8
"""Problems that a message lists; the rest is counted."""


@frozen(eq=False)
class Loaded:
    """A checkpoint that was read and verified.

    Attributes:
        path: its folder.
        state: the state of training; None if only the model was saved.
        position: where the data stood.
        trainer_state: the text of ``trainer_state.json``.
        arguments: the arguments of the training that wrote it.
        host_rng: the random state of each rank's host.
        manifest: what it consists of; ``manifest.step`` is its step.
        source: where the state is to be read from, if it was not read; see ``open_lazily``.
        foreign: what the Hugging Face Trainer wrote, for a checkpoint that is its own; such a one has no
            state, position, arguments, files and digests. None for those of this package.
    """

    path: Path
    state: TrainState | None
    position: dict[str, Any]
    trainer_state: str
    arguments: dict[str, Any]
    host_rng: dict[int, dict[str, Any]]
    manifest: Manifest
    foreign: Foreign | None = None
    source: Source | None = None


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Loaded:
    """Read a checkpoint once, verifying all of it; the state's tensors are put on ``device``.

    A checkpoint of the Hugging Face Trainer is recognised by its files; what can be verified of it says
    ``hf_reader.problems``. Files that only describe the model may have been edited: that is warned of.

    Raises:
        CheckpointError: if anything is missing or is not what was written, with everything found.
    """
    path = Path(path)
    if is_foreign(path):
        return _load_foreign(path)
    scan = Scan(path, keep=True, digests=False)
    _raise_if_any(path, scan.run())
    for change in scan.changes:
        logger.warning("%s has changed since it was saved: %s", path, change)
    assert scan.manifest is not None
    train_state = json.loads(scan.texts[TRAIN_STATE])
    state = None
    if train_state["state"] is not None:
        whole = specs(train_state["state"]["structure"])
        leaves = join(scan.tensors, train_state.get("pieces", {}), whole)
        tensors = {leaf: tensor.to(device) for leaf, tensor in leaves.items()}
        state = _rebuild(path, tensors, train_state["state"])
    return _loaded(scan, state)


def open_lazily(path: str | os.PathLike[str]) -> Loaded:
    """Read and verify all of a checkpoint but the tensors, for processes that each need parts of them.

    ``Loaded.source`` gives them, each verified when it is read.

    Raises:
        CheckpointError: if anything is missing or is not what was written, or for a checkpoint of the
            Hugging Face Trainer.
    """
    path = Path(path)
    if is_foreign(path):
        raise CheckpointError(
            f"{path}: a checkpoint of the Hugging Face Trainer cannot be resumed by distributed training "
            "(fsdp). Resume it without fsdp for one step, which saves it in this package's format"
        )
    scan = Scan(path, keep=False, digests=False)
    _raise_if_any(path, scan.read_texts())
    assert scan.manifest is not None
    train_state = json.loads(scan.texts[TRAIN_STATE])
    source = None
    if train_state["state"] is not None:
        source = Source.of_checkpoint(path, scan.manifest, train_state)
    return _loaded(scan, None, source)


def _loaded(scan: Scan, state: TrainState | None, source: Source | None = None) -> Loaded:
    assert scan.manifest is not None
    ranks = {rank: name for name in scan.texts if (rank := host_rng_rank(name)) is not None}
    return Loaded(
        path=scan.path,
        state=state,
        position=json.loads(scan.texts[TRAIN_STATE])["position"],
        trainer_state=scan.texts[TRAINER_STATE].decode(),
        arguments=json.loads(scan.texts[ARGUMENTS]),
        host_rng={rank: json.loads(scan.texts[ranks[rank]]) for rank in sorted(ranks)},
        manifest=scan.manifest,
        source=source,
    )


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is a checkpoint, whole or damaged, of this package or of Hugging Face's."""
    if not path.is_dir():
        return False
    ours = any((path / name).exists() for name in (MANIFEST, TRAIN_STATE, ARGUMENTS, OPTIMIZER))
    return ours or is_foreign(path) or step_of(path) is not None


def verify(
    path: str | os.PathLike[str], *, leaves: bool = False, descriptions: bool = True
) -> list[str]:
    """Read a whole checkpoint and return what is wrong with it, in words; nothing if it is fine.

    Checked are the manifest, the presence, size and SHA-256 of every file, that each leaf of the state is
    in its file, and that the folder is named after the step that it holds. In a damaged file the leaves
    whose digests do not fit are named. Other files in the folder are not looked at. A checkpoint of the
    Hugging Face Trainer has no manifest, so that less can be checked; see ``hf_reader.problems``.

    Args:
        path: the checkpoint's folder.
        leaves: digest also the leaves in ``optimizer.pt``, whose SHA-256 does not need that: where it fits
            this can only find mistakes made when it was written.
        descriptions: count also changes to files that only describe the model (its ``config.json``, the
            tokenizer's), which ``load`` warns of.
    """
    path = Path(path)
    if is_foreign(path):
        return hf_reader.problems(path)
    scan = Scan(path, keep=False, digests=leaves)
    problems = scan.run() + (scan.changes if descriptions else [])
    named = step_of(path)
    if scan.manifest is not None and named not in (None, scan.manifest.step):
        problems.append(f"{path.name}: it holds step {scan.manifest.step}; the folder was renamed")
    return problems


def newest(root: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the checkpoint of the highest step that verifies, and those passed over with the reason.

    Nothing is passed over because files were edited that only describe the model. Nothing is changed on the
    disk, so several processes may ask at once. If a save was killed while
    it replaced a checkpoint, the one that it had set aside is found under its hidden name
    ``.old-checkpoint-<step>-<process>``.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _candidates(Path(root)):
        problems = verify(path, descriptions=False)
        if not problems:
            return path, skipped
        skipped.append((path, "; ".join(_shorten(problems))))
    return None, skipped


def _load_foreign(path: Path) -> Loaded:
    _raise_if_any(path, hf_reader.problems(path))
    try:
        foreign, random_states, step = hf_reader.read_foreign(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be used:\n  {error}") from error
    return Loaded(
        path=path,
        state=None,
        position={},
        trainer_state=(path / TRAINER_STATE).read_text(),
        arguments={},
        host_rng=random_states,
        manifest=Manifest(step, max(1, len(random_states)), {}, {}, {}),
        foreign=foreign,
    )


def _raise_if_any(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be used:\n  " + "\n  ".join(_shorten(problems)) + "\n"
            "Resume from another one (newest(folder) finds it), or restore this one from a copy"
        )


def _rebuild(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> TrainState:
    try:
        return from_flat(tensors, metadata)
    except ValueError as error:  # written by another version of the core
        raise CheckpointError(
            f"{path / TRAIN_STATE}: {error}. Resume with the version of trainstep in {MANIFEST}"
        ) from error


def _candidates(root: Path) -> list[Path]:
    """Return what may be resumed from, best first: by step, set-aside ones behind their successors."""
    found = [(step_of(path) or 0, 1, path) for path in list_checkpoints(root)]
    found += [
        (sibling.step, 0, sibling.path) for sibling in siblings(root) if sibling.kind == "old"
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - _MAX_SHOWN
    return problems if more <= 0 else [*problems[:_MAX_SHOWN], f"and {more} more"]
