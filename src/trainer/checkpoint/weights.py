"""Where the leaves of a state lie: weights in the model's own files, the rest in ours.

Weights are not stored twice. A parameter or buffer counts as stored by the model only if a tensor of
the same name, dtype, shape and bits was found in the files that ``write_model`` left. Tied, renamed or
converted weights fail that test and go to ``weights.safetensors``, so nothing is lost whatever the
model writes. All other leaves go to ``optimizer.safetensors``, which is written meanwhile.
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import Hashing, Workers, bytes_of, host_tensor
from trainer.checkpoint.layout import OPTIMIZER, PARTIAL
from trainer.checkpoint.manifest import File
from trainer.checkpoint.tensors import Entry, holds, storable, write_tensors
from trainer.checkpoint.trees import TensorFile, node_path
from trainstep.compare import leaf_digest

_IN_MODEL = ("params/", "buffers/")


@define
class Stored:
    """What is on the disk so far; final after the joins in ``writer``.

    Attributes:
        leaves: the paths of all leaves of the state.
        shas: file -> SHA-256 object, for files that are hashed as they are.
        trees: file -> its tensors; digests are missing for those that are leaves under their own path.
        where: leaf path -> (file, tensor's name there), for leaves outside of the optimizer's file.
        raw: leaf path -> (dtype, shape), for leaves that are stored as their bytes.
    """

    leaves: Container[str]
    shas: dict[str, Any] = field(factory=dict)
    trees: dict[str, TensorFile] = field(factory=dict)
    where: dict[str, tuple[str, str]] = field(factory=dict)
    raw: dict[str, tuple[str, list[int]]] = field(factory=dict)

    def files(self, folder: Path, digests: dict[str, str]) -> dict[str, File]:
        """Return the manifest's entries, given the digests of all leaves."""
        found = {name: File(0, sha.hexdigest()) for name, sha in self.shas.items()}
        for name, tree in self.trees.items():
            for entry in tree.entries:
                if entry.name not in tree.nodes:
                    tree.nodes[entry.name] = digests[node_path(entry.name, self.leaves)]
            found[name] = File(0, tree.digest(), "tensors")
        return {
            name: File((folder / name).stat().st_size, file.sha256, file.of)
            for name, file in found.items()
        }


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
        syncing.put(io.sync_file, path)
        if path.suffix != ".safetensors":
            stored.shas[name] = hashing.file(path)
            continue
        try:
            stored.trees[name] = tree = TensorFile.open(path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for entry in tree.entries:
            comparing.put(_match, tree, name, entry, weights, stored, found, hashing)
    comparing.join()
    # Sorted, so that a weight which two files hold is always said to be in the same one.
    stored.where |= {leaf: (file, name) for leaf, file, name in sorted(found, reverse=True)}


def write_leaves(
    path: Path,
    name: str,
    leaves: dict[str, Tensor],
    stored: Stored,
    hashing: Hashing,
    syncing: Workers,
) -> None:
    """Write leaves under their paths to a file that will be called ``name``."""
    plain, nodes = {}, {}
    for leaf, tensor in leaves.items():
        if storable(tensor.dtype):
            plain[leaf] = tensor
        else:
            stored.raw[leaf] = (str(tensor.dtype), list(tensor.shape))
            plain[leaf] = host_tensor(tensor).reshape(-1).view(torch.uint8)
            nodes[leaf] = leaf_digest(leaf, plain[leaf]).hex()
        if name != OPTIMIZER:
            stored.where[leaf] = (name, leaf)

    def digest(leaf: str, host: Tensor) -> None:
        if leaf in stored.raw:
            host = host.view(leaves[leaf].dtype).reshape(leaves[leaf].shape)
        hashing.leaf(leaf, host)

    write_tensors(path, plain, digest, lambda: syncing.put(io.sync_file, path))
    stored.trees[name] = TensorFile.open(path)
    stored.trees[name].nodes.update(nodes)


def _match(
    tree: TensorFile,
    name: str,
    entry: Entry,
    weights: dict[str, Tensor],
    stored: Stored,
    found: set[tuple[str, str, str]],
    hashing: Hashing,
) -> None:
    """Find the leaves that a tensor in the model's files has the bits of, and digest it."""
    own = node_path(entry.name, stored.leaves)
    for leaf in (f"params/{entry.name}", f"buffers/{entry.name}"):
        ours = weights.get(leaf)
        if ours is None or (ours.dtype, tuple(ours.shape)) != (entry.dtype, entry.shape):
            continue
        host = host_tensor(ours)
        if holds(tree.path, len(tree.header) + entry.start, bytes_of(host)):
            found.add((leaf, name, entry.name))
            hashing.leaf(leaf, host)
    if (own, name, entry.name) not in found:
        tree.read([entry], {entry.name: own}, {})
