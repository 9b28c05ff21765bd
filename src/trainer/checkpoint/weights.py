"""Where the leaves of a state lie: in the model's own files, or in ``optimizer.safetensors``.

Weights are not stored twice. A leaf counts as stored by the model only if a tensor of the same name,
dtype, shape and bits was found in the files that ``write_model`` left: tied, renamed or converted
weights fail that test and go to the optimizer's file, so nothing is lost whatever the model writes.
"""

from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import (
    Hashing,
    Workers,
    host_tensor,
    new_sha,
    same_bytes,
)
from trainer.checkpoint.layout import OPTIMIZER
from trainer.checkpoint.tensors import Entry, read_tensors, skim, storable, write_tensors


@define
class Stored:
    """What is on the disk so far.

    Attributes:
        shas: the SHA-256 object of each file by name, final after ``Hashing.join``.
        where: leaf path -> (file, tensor's name there), for leaves that the model's files hold.
        raw: leaf path -> (dtype, shape), for leaves that the optimizer's file holds as bytes.
    """

    shas: dict[str, Any] = field(factory=dict)
    where: dict[str, tuple[str, str]] = field(factory=dict)
    raw: dict[str, tuple[str, list[int]]] = field(factory=dict)


def absorb_model(
    folder: Path, leaves: dict[str, Tensor], hashing: Hashing, syncing: Workers
) -> Stored:
    """Hash and sync every file that the model wrote, and find the leaves that they hold."""
    stored = Stored()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        syncing.put(io.sync_file, path)
        name = path.relative_to(folder).as_posix()
        stored.shas[name] = sha = new_sha()
        if path.suffix == ".safetensors":
            _match(path, name, leaves, stored, hashing, sha)
        else:
            with open(path, "rb", buffering=0) as file:
                skim(file, path.stat().st_size, sha, hashing)
    hashing.join()
    return stored


def write_rest(path: Path, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing) -> None:
    """Write the leaves that the model's files do not hold to ``optimizer.safetensors``."""
    rest = {}
    for leaf, tensor in leaves.items():
        if leaf in stored.where:
            continue
        if not storable(tensor.dtype):
            stored.raw[leaf] = (str(tensor.dtype), list(tensor.shape))
            tensor = _as_bytes(tensor)
        rest[leaf] = tensor

    def digest(leaf: str, host: Tensor) -> None:
        if leaf in stored.raw:
            host = host.view(leaves[leaf].dtype).reshape(leaves[leaf].shape)
        hashing.leaf(leaf, host)

    stored.shas[OPTIMIZER] = write_tensors(path / OPTIMIZER, rest, hashing, digest)


def _as_bytes(tensor: Tensor) -> Tensor:
    return host_tensor(tensor).reshape(-1).view(torch.uint8)


def _match(
    path: Path, name: str, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing, sha: Any
) -> None:
    def candidates(entry: Entry) -> list[str]:
        return [
            leaf
            for leaf in (f"params/{entry.name}", f"buffers/{entry.name}")
            if leaf not in stored.where
            and (tensor := leaves.get(leaf)) is not None
            and tensor.dtype == entry.dtype
            and tuple(tensor.shape) == entry.shape
        ]

    def compare(leaf: str, written: Tensor, ours: Tensor) -> None:
        if same_bytes(written, ours):
            hashing.digest(leaf, written)
            stored.where[leaf] = (name, leaf.partition("/")[2])

    for entry, written in read_tensors(path, hashing, sha, lambda entry: bool(candidates(entry))):
        if written is not None:
            for leaf in candidates(entry):
                hashing.tasks.put(compare, leaf, written, host_tensor(leaves[leaf]))
