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
    CHUNK,
    Hashing,
    Workers,
    bytes_of,
    host_tensor,
    new_sha,
    same_bytes,
)
from trainer.checkpoint.layout import OPTIMIZER
from trainer.checkpoint.tensors import Entry, read_bytes, read_index, storable, write_tensors

_PROBE = 4096
"""Bytes of a leaf that are compared before it is taken to be in the model's file."""


@define
class Stored:
    """What is on the disk so far.

    Attributes:
        shas: the SHA-256 object of each file by name, final after the joins in ``writer``.
        where: leaf path -> (file, tensor's name there), for leaves that the model's files hold.
        raw: leaf path -> (dtype, shape), for leaves that the optimizer's file holds as bytes.
        differing: leaves in ``where`` that turned out not to be there, bit for bit.
    """

    shas: dict[str, Any] = field(factory=dict)
    where: dict[str, tuple[str, str]] = field(factory=dict)
    raw: dict[str, tuple[str, list[int]]] = field(factory=dict)
    differing: set[str] = field(factory=set)


def absorb_model(
    folder: Path, leaves: dict[str, Tensor], hashing: Hashing, syncing: Workers
) -> Stored:
    """Start to sync and hash every file that the model wrote, and find the leaves that they hold.

    What looks like a leaf is compared with it to the last bit in the background; ``differing`` is
    final after ``hashing.join()``.

    Raises:
        ValueError: naming a file that ends in .safetensors and is not in that format.
    """
    stored = Stored()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        stored.shas[name] = sha = new_sha()
        syncing.put(_sync_and_hash, path, sha)
        if path.suffix == ".safetensors":
            try:
                _match(path, name, leaves, stored, hashing)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return stored


def write_rest(folder: Path, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing) -> None:
    """Write the leaves that the model's files do not hold to ``optimizer.safetensors``."""
    rest = {}
    for leaf, tensor in leaves.items():
        if leaf in stored.where:
            continue
        if not storable(tensor.dtype):
            stored.raw[leaf] = (str(tensor.dtype), list(tensor.shape))
            tensor = host_tensor(tensor).reshape(-1).view(torch.uint8)
        rest[leaf] = tensor

    def digest(leaf: str, host: Tensor) -> None:
        if leaf in stored.raw:
            host = host.view(leaves[leaf].dtype).reshape(leaves[leaf].shape)
        hashing.leaf(leaf, host)

    stored.shas[OPTIMIZER] = write_tensors(folder / OPTIMIZER, rest, hashing, digest)


def mend(folder: Path, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing) -> None:
    """Write ``optimizer.safetensors`` again if the model's files lack leaves that they seemed to hold.

    Rare: the names, types, shapes and first bytes agree but not the rest.
    """
    if stored.differing:
        for leaf in stored.differing:
            del stored.where[leaf]
        io.unlink(folder / OPTIMIZER)
        write_rest(folder, leaves, stored, hashing)
        hashing.join()


def _sync_and_hash(path: Path, sha: Any) -> None:
    io.sync_file(path)
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            sha.update(data)


def _match(
    path: Path, name: str, leaves: dict[str, Tensor], stored: Stored, hashing: Hashing
) -> None:
    entries, base = read_index(path)

    def compare(leaf: str, entry: Entry, ours: Tensor) -> None:
        written = read_bytes(path, base + entry.start, entry.size)
        if same_bytes(written, bytes_of(ours)):
            hashing.digest(leaf, ours)
        else:
            stored.differing.add(leaf)

    for entry in entries:
        for leaf in (f"params/{entry.name}", f"buffers/{entry.name}"):
            tensor = leaves.get(leaf)
            if tensor is None or leaf in stored.where or not _alike(entry, tensor):
                continue
            ours = host_tensor(tensor)
            probe = read_bytes(path, base + entry.start, min(entry.size, _PROBE))
            if same_bytes(probe, bytes_of(ours)[:_PROBE]):
                stored.where[leaf] = (name, entry.name)
                hashing.tasks.put(compare, leaf, entry, ours)


def _alike(entry: Entry, tensor: Tensor) -> bool:
    return tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape
