"""The tensors of a checkpoint, read piece by piece when they are needed, each against its digest."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hashing import bytes_of
from trainer.checkpoint.layout import OPTIMIZER
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.pieces import part, specs
from trainer.checkpoint.tensors import Entry, read_index, read_pieces
from trainer.checkpoint.trees import leaf_sha


@frozen
class Piece:
    """A box of a tensor that lies in one file.

    Attributes:
        path: under which it was digested.
        file: in which it is.
        name: its name there.
        offsets: where in the whole tensor it begins.
        lengths: its shape.
    """

    path: str
    file: str
    name: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@define(eq=False)
class Source:
    """Where the tensors of a state are.

    Attributes:
        folder: the checkpoint.
        metadata: of the state, see ``trainstep.serialize``.
        model: name in the model's file -> leaf; empty if the checkpoint has a model's file.
        whole: leaf -> (dtype, shape).
        pieces: leaf -> its pieces.
        digests: by the paths of pieces.
    """

    folder: Path
    metadata: dict[str, Any]
    model: dict[str, str]
    whole: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    pieces: dict[str, list[Piece]]
    digests: Mapping[str, str]
    _indices: dict[str, tuple[dict[str, Entry], int]] = field(factory=dict, init=False)

    @classmethod
    def of_checkpoint(
        cls, folder: Path, manifest: Manifest, train_state: Mapping[str, Any]
    ) -> "Source":
        """Describe a checkpoint, in pieces or not, from what its JSON files say."""
        metadata, where = train_state["state"], train_state["where"]
        whole = specs(metadata["structure"])
        index = train_state.get("pieces", {})
        pieces: dict[str, list[Piece]] = {}
        for leaf, (_, shape) in whole.items():
            boxes = index.get(leaf, {leaf: [(0,) * len(shape), shape]})
            pieces[leaf] = []
            for path, (offsets, lengths) in boxes.items():
                file, name = where.get(path, (OPTIMIZER, path))
                pieces[leaf].append(Piece(path, file, name, tuple(offsets), tuple(lengths)))
        model = train_state.get("model", {})
        return cls(folder, metadata, model, whole, pieces, manifest.leaves)

    def read(self, leaf: str, piece: Piece) -> Tensor:
        """Return a piece, on the host.

        Raises:
            CheckpointError: if it cannot be read, or is not what was saved.
        """
        dtype, _ = self.whole[leaf]
        tensor = torch.empty(piece.lengths, dtype=dtype)
        sha = leaf_sha(piece.path, dtype, piece.lengths)
        try:
            entries, start = self._index(piece.file)
            entry = entries[piece.name]
            if entry.size != tensor.nbytes:
                raise ValueError(f"{piece.name} has {entry.size} bytes, expected {tensor.nbytes}")
            with open(self.folder / piece.file, "rb", buffering=0) as file:
                file.seek(start + entry.start)
                read_pieces(file, entry.size, sha.update, bytes_of(tensor))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / piece.file}: {piece.path} cannot be read: {error!r}. `trainstep verify "
                f"{self.folder}` says more"
            ) from error
        if sha.hexdigest() != self.digests[piece.path]:
            raise CheckpointError(
                f"{self.folder / piece.file}: the values of {piece.path} are not those saved. Resume from "
                "another checkpoint, or restore this one from a copy"
            )
        return tensor

    def assemble(self, leaf: str) -> Tensor:
        """Return a whole tensor, on the host.

        Raises:
            CheckpointError: see ``read``.
        """
        dtype, shape = self.whole[leaf]
        pieces = self.pieces[leaf]
        if len(pieces) == 1:
            return self.read(leaf, pieces[0])
        joined = torch.empty(shape, dtype=dtype)
        for piece in pieces:
            part(joined, piece.offsets, piece.lengths).copy_(self.read(leaf, piece))
        return joined

    def sorted(self, leaves: Iterable[str]) -> list[str]:
        """Return leaves in the order of their places on the disk."""
        return sorted(leaves, key=lambda leaf: [(p.file, p.name) for p in self.pieces[leaf]])

    def _index(self, name: str) -> tuple[dict[str, Entry], int]:
        if name not in self._indices:
            entries, start = read_index(self.folder / name)
            self._indices[name] = {entry.name: entry for entry in entries}, start
        return self._indices[name]
