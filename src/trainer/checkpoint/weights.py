"""Where the leaves of a state lie: weights in the model's own files, the rest in ours.

Weights are not stored twice. A parameter or buffer counts as stored by the model only if a tensor of
the same name, dtype, shape and bits was found in the files that ``write_model`` left. Tied, renamed or
converted weights fail that test and go to ``weights.safetensors``, so nothing is lost whatever the
model writes. All other leaves go to ``optimizer.safetensors``, which is written meanwhile.
"""

from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import (
    CHUNK,
    Hashing,
    Workers,
    bytes_of,
    host_tensor,
    new_sha,
    same_bytes,
)
from trainer.checkpoint.layout import OPTIMIZER, PARTIAL
from trainer.checkpoint.tensors import Entry, read_bytes, read_index, storable, write_tensors

_IN_MODEL = ("params/", "buffers/")


@define
class Stored:
    """What is on the disk so far; final after the joins in ``writer``.

    Attributes:
        shas: the SHA-256 object of each file by name.
        where: leaf path -> (file, tensor's name there), for leaves outside of the optimizer's file.
        raw: leaf path -> (dtype, shape), for leaves that are stored as their bytes.
    """

    shas: dict[str, Any] = field(factory=dict)
    where: dict[str, tuple[str, str]] = field(factory=dict)
    raw: dict[str, tuple[str, list[int]]] = field(factory=dict)


def split(leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the leaves that the model's files may hold, and the others."""
    weights = {path: leaf for path, leaf in leaves.items() if path.startswith(_IN_MODEL)}
    return weights, {path: leaf for path, leaf in leaves.items() if path not in weights}


def absorb_model(
    folder: Path,
    weights: dict[str, Tensor],
    stored: Stored,
    hashing: Hashing,
    syncing: Workers,
    comparing: Workers,
) -> None:
    """Start to sync and hash every file that the model wrote; put in ``stored.where`` what they hold.

    Raises:
        ValueError: naming a file that ends in .safetensors and is not in that format.
    """
    found: set[tuple[str, str, str]] = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == PARTIAL:
            continue
        stored.shas[name] = sha = new_sha()
        syncing.put(_sync_and_hash, path, sha)
        if path.suffix == ".safetensors":
            try:
                _match(path, name, weights, found, hashing, comparing)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    comparing.join()
    # Sorted, so that a weight which two files hold is always said to be in the same one.
    stored.where |= {leaf: (file, name) for leaf, file, name in sorted(found, reverse=True)}


def write_leaves(
    path: Path, name: str, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing
) -> None:
    """Write leaves under their paths to a file that will be called ``name``."""
    plain = {}
    for leaf, tensor in leaves.items():
        if storable(tensor.dtype):
            plain[leaf] = tensor
        else:
            stored.raw[leaf] = (str(tensor.dtype), list(tensor.shape))
            plain[leaf] = host_tensor(tensor).reshape(-1).view(torch.uint8)
        if name != OPTIMIZER:
            stored.where[leaf] = (name, leaf)

    def digest(leaf: str, host: Tensor) -> None:
        if leaf in stored.raw:
            host = host.view(leaves[leaf].dtype).reshape(leaves[leaf].shape)
        hashing.leaf(leaf, host)

    stored.shas[name] = write_tensors(path, plain, hashing, digest)


def _sync_and_hash(path: Path, sha: Any) -> None:
    io.sync_file(path)
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            sha.update(data)


def _match(
    path: Path,
    name: str,
    weights: dict[str, Tensor],
    found: set[tuple[str, str, str]],
    hashing: Hashing,
    comparing: Workers,
) -> None:
    entries, base = read_index(path)

    def compare(leaf: str, entry: Entry, ours: Tensor) -> None:
        written = read_bytes(path, base + entry.start, entry.size)
        if same_bytes(written, bytes_of(ours)):
            found.add((leaf, name, entry.name))
            hashing.leaf(leaf, ours)

    for entry in entries:
        for leaf in (f"params/{entry.name}", f"buffers/{entry.name}"):
            ours = weights.get(leaf)
            if ours is None or (ours.dtype, tuple(ours.shape)) != (entry.dtype, entry.shape):
                continue
            comparing.put(compare, leaf, entry, host_tensor(ours))
