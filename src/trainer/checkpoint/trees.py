"""The digest of a safetensors file that hashes each byte once, though every leaf has a digest as well.

It is the SHA-256 of the file's header followed by the digests (32 bytes each) of its tensors in the
order of their bytes. A tensor's digest is that of the leaf which it is, where the manifest has one of its
name; else it is formed alike, under the tensor's own name. Header and tensors are all of the file, so
that any change of it shows, and shows in which tensor.
"""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint.hashing import bytes_of, new_sha
from trainer.checkpoint.tensors import Entry, read_header, read_pieces

_RUN = 1 << 23
"""Bytes of neighbouring tensors that one thread reads in one go."""


def leaf_sha(path: str, dtype: torch.dtype | str, shape: Iterable[int]) -> Any:
    """Return a SHA-256 that becomes ``trainstep.compare.leaf_digest`` when fed the tensor's bytes."""
    return new_sha(f"{path}:{dtype}:{tuple(shape)}".encode())


def node_path(name: str, leaves: Container[str]) -> str:
    """Return the path under which a tensor of a file is digested."""
    for path in (name, f"params/{name}", f"buffers/{name}"):
        if path in leaves:
            return path
    return name


def tree_digest(header: bytes, nodes: Iterable[str]) -> str:
    """Return the digest of a file from its header and its tensors' digests, in hexadecimal."""
    sha = new_sha(header)
    for node in nodes:
        sha.update(bytes.fromhex(node))
    return str(sha.hexdigest())


@define(eq=False)
class TensorFile:
    """A safetensors file that is read in pieces, by several threads, to digest its tensors.

    Attributes:
        path: the file.
        header: its bytes before the data.
        entries: its tensors.
        nodes: their digests by name.
    """

    path: Path
    header: bytes
    entries: list[Entry]
    nodes: dict[str, str] = field(factory=dict)

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read the header.

        Raises:
            ValueError: if the file is not in the format.
        """
        entries, header = read_header(path)
        return cls(path, header, entries)

    def digest(self) -> str:
        """Return the file's digest; all nodes must be known."""
        return tree_digest(self.header, (self.nodes[entry.name] for entry in self.entries))

    def runs(self) -> list[list[Entry]]:
        """Return the entries in groups of neighbours, small ones together."""
        groups: list[list[Entry]] = []
        size = _RUN
        for entry in self.entries:
            if size >= _RUN:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += entry.size
        return groups

    def read(
        self, run: list[Entry], paths: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> None:
        """Read and digest neighbouring tensors.

        Args:
            run: which.
            paths: from a tensor's name to the path under which it is digested.
            tensors: contiguous tensors to fill, by name; the others are only digested.

        Raises:
            ValueError: if the file ends before.
        """
        with open(self.path, "rb", buffering=0) as file:
            file.seek(len(self.header) + run[0].start)
            for entry in run:
                sha = leaf_sha(paths[entry.name], entry.dtype or entry.kind, entry.shape)
                target = bytes_of(tensors[entry.name]) if entry.name in tensors else None
                read_pieces(file, entry.size, sha.update, target)
                self.nodes[entry.name] = sha.hexdigest()
