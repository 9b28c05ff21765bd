"""Reading checkpoints without their tensors: all that JSON says, and the digest of the state."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from trainer import digest_log
from trainer.checkpoint import CheckpointError, Manifest, list_checkpoints
from trainer.checkpoint.hf_format import OPTIMIZER_PT
from trainer.checkpoint.layout import (
    ARGUMENTS,
    DEEPSPEED,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
)
from trainer.checkpoint.manifest import parse_manifest
from trainer.cli.result import Refusal
from trainstep import tree
from trainstep.compare import leaf_digest
from trainstep.serialize import from_flat
from trainstep.state import TrainState

_NO_DIGEST = {
    "sharded": "saved in pieces",
    "deepspeed": "the state is in DeepSpeed's own files",
}


@frozen
class Leaf:
    """One tensor of a state: its path, dtype, shape, digest, and the file that holds it.

    In pieces, it has no digest, and several files.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    file: str

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * getattr(torch, self.dtype).itemsize


@frozen(eq=False)
class Glance:
    """A checkpoint as far as its JSON files tell.

    Attributes:
        path: its folder.
        manifest: what it consists of.
        position: where the data stand.
        trainer_state: progress and log history.
        arguments: of the training.
        leaves: the tensors of the state; none if only the model was saved, or DeepSpeed has the state.
        digests: the digest of every leaf by path, of those too that are no tensors
            (``trainstep.leaf_digests`` of the state); empty for the reason that ``no_digest`` gives.
        format: ``safe``; ``sharded``, in which processes saved their parts of tensors, each with a digest
            of its own; ``deepspeed``; or ``hf``, with Hugging Face's files.
    """

    path: Path
    manifest: Manifest
    position: dict[str, Any]
    trainer_state: dict[str, Any]
    arguments: dict[str, Any]
    leaves: list[Leaf]
    digests: dict[str, str]
    format: str

    @property
    def digest(self) -> str | None:
        """``trainstep.digest`` of the state; None for the reason that ``no_digest`` gives."""
        return digest_log.combine(self.digests) if self.digests else None

    @property
    def no_digest(self) -> str:
        """Why there is no digest of the state."""
        return why_no_digest(self.format)


def why_no_digest(format_: str) -> str:
    """Return why a checkpoint of this format has no digest of the state."""
    return _NO_DIGEST.get(format_, "saved with save_only_model")


def glance(path: Path) -> Glance:
    """Read the JSON files of a checkpoint, checking them against its manifest.

    Raises:
        Refusal: if the manifest or one of the files is missing or damaged.
    """
    try:
        manifest = parse_manifest((path / MANIFEST).read_bytes())
        texts = {name: _text(path, manifest, name) for name in (TRAIN_STATE, TRAINER_STATE)}
        arguments = _text(path, manifest, ARGUMENTS)
    except (OSError, CheckpointError) as error:
        raise Refusal(f"{path}: {error}; `trainstep verify {path}` says more") from None
    train_state = texts[TRAIN_STATE]
    kind = _format(manifest, train_state)
    # What DeepSpeed's checkpoints have beside the engine's files is a step and a key, not a state.
    leaves, digests = ([], {}) if kind == "deepspeed" else _leaves(manifest, train_state)
    return Glance(
        path=path,
        manifest=manifest,
        position=train_state["position"],
        trainer_state=texts[TRAINER_STATE],
        arguments=arguments,
        leaves=leaves,
        digests=digests,
        format=kind,
    )


def _format(manifest: Manifest, train_state: dict[str, Any]) -> str:
    if DEEPSPEED in train_state["position"]:
        return "deepspeed"
    if "pieces" in train_state:
        return "sharded"
    return "hf" if OPTIMIZER_PT in manifest.files else "safe"


def _text(path: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    data = (path / name).read_bytes()
    if name not in manifest.files or hashlib.sha256(data).hexdigest() != (
        manifest.files[name].sha256
    ):
        raise CheckpointError(f"{name} is damaged")
    return dict(json.loads(data))


def _leaves(manifest: Manifest, train_state: dict[str, Any]) -> tuple[list[Leaf], dict[str, str]]:
    if train_state["state"] is None:
        return [], {}
    where, pieces = train_state["where"], train_state.get("pieces", {})
    shapes = _tensor_specs(train_state["state"]["structure"])
    leaves = [
        Leaf(
            path,
            spec["dtype"].removeprefix("torch."),
            tuple(spec["shape"]),
            manifest.leaves.get(path, ""),
            _files(pieces[path], where)
            if path in pieces
            else where.get(path, (OPTIMIZER, path))[0],
        )
        for path, spec in shapes.items()
    ]
    if pieces:  # only they have digests
        return leaves, {}
    # Tensors without memory stand for the real ones, whose digests the manifest has.
    hollow = {
        leaf.path: torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype), device="meta")
        for leaf in leaves
    }
    state = from_flat(hollow, train_state["state"])
    return leaves, {
        path: manifest.leaves[path] if path in hollow else leaf_digest(path, value).hex()
        for path, value in _entries(state)
    }


def _files(pieces: dict[str, Any], where: dict[str, Any]) -> str:
    return ", ".join(sorted({where[piece][0] for piece in pieces}))


def _entries(state: TrainState) -> list[tuple[str, Any]]:
    """Return what ``trainstep.digest`` covers: every leaf, the step and the key."""
    return [*tree.leaves_with_paths(state), ("step", state.step), ("key", state.key.bits)]


def _tensor_specs(structure: Any) -> dict[str, dict[str, Any]]:
    """Return path -> description of every tensor in the structure that ``to_flat`` describes."""
    if isinstance(structure, dict) and "tensor" in structure:
        return {structure["tensor"]: structure}
    inner = structure.values() if isinstance(structure, dict) else structure
    found: dict[str, dict[str, Any]] = {}
    if isinstance(structure, dict | list):
        for value in inner:
            found |= _tensor_specs(value)
    return found


def checkpoint_at(path: Path) -> Path:
    """Return ``path`` if it can be a checkpoint.

    Raises:
        Refusal: if there is no such folder, or it is an output folder with checkpoints in it.
    """
    if not path.is_dir():
        raise Refusal(f"{path}: no such folder; give the folder of a checkpoint")
    inner = [one.name for one in list_checkpoints(path)]
    if inner and not (path / MANIFEST).exists():
        raise Refusal(
            f"{path}: it holds checkpoints and is none itself; give one of {', '.join(inner)} in it"
        )
    return path


def newest_at(path: Path) -> Path:
    """Return the checkpoint of the highest step in an output folder, or ``path`` if it can be one itself.

    Raises:
        Refusal: if there is no such folder.
    """
    inner = list_checkpoints(path)
    return inner[-1] if inner and not (path / MANIFEST).exists() else checkpoint_at(path)
