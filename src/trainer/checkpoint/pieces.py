"""Checkpoints whose tensors lie in pieces: what they are called, where they belong, how they join.

``state-<rank>.safetensors`` holds what one process had of the state. A tensor in several pieces has an
entry in ``train_state.json``, ``"pieces": {leaf: {piece: [offsets, lengths]}}``; the manifest has the
digest of each piece as that of a leaf, so that pieces are verified like any tensor.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from trainstep import sharded, tree
from trainstep.serialize import to_flat
from trainstep.state import TrainState

_STATE = re.compile(r"state-(\d+)\.safetensors", re.ASCII)


@frozen
class Layout:
    """What the parts that a process holds are parts of.

    Attributes:
        metadata: of the whole state, see ``trainstep.serialize.to_flat``.
        places: leaf -> (shape of the whole, where the part begins), for leaves in parts.
        model: name in the model's file -> leaf.
    """

    metadata: dict[str, Any]
    places: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(factory=dict)
    model: dict[str, str] = field(factory=dict)


def take_apart(state: TrainState, model: Mapping[str, str]) -> tuple[TrainState, Layout]:
    """Return this process's parts of a state, sharing its memory, and their layout.

    Args:
        state: the state; tensors that processes hold in parts are DTensors.
        model: name in the model's file -> leaf.
    """
    leaves, metadata = to_flat(state)
    places = {
        leaf: (tuple(tensor.shape), _offsets(tensor))
        for leaf, tensor in leaves.items()
        if sharded.is_sharded(tensor)
    }
    return tree.map(sharded.local, state), Layout(metadata, places, dict(model))


def _offsets(tensor: Any) -> tuple[int, ...]:
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets)


def state_file(rank: int) -> str:
    """Return the name of the file with one process's pieces."""
    return f"state-{rank}.safetensors"


def is_state_file(name: str) -> bool:
    """Tell whether a file holds pieces."""
    return _STATE.fullmatch(name) is not None


def is_in_pieces(folder: Path) -> bool:
    """Tell whether a checkpoint's tensors lie in pieces."""
    return folder.is_dir() and any(is_state_file(path.name) for path in folder.iterdir())


def piece_name(
    leaf: str, whole: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
) -> str:
    """Return what a piece is called: its leaf's path, and where it begins unless it is all."""
    if tuple(whole) == tuple(lengths):
        return leaf
    return f"{leaf}@{','.join(map(str, offsets))}"


def specs(structure: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return leaf -> (dtype, shape) of every tensor in the structure that ``to_flat`` describes."""
    return dict(_specs(structure))


def _specs(structure: Any) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    if isinstance(structure, dict) and "tensor" in structure:
        dtype = getattr(torch, structure["dtype"].removeprefix("torch."))
        yield structure["tensor"], (dtype, tuple(structure["shape"]))
    elif isinstance(structure, dict | list):
        for value in structure.values() if isinstance(structure, dict) else structure:
            yield from _specs(value)


def join(
    pieces: dict[str, Tensor], index: Mapping[str, Any], whole: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return whole tensors from pieces, which are taken out of the dict one after the other.

    Args:
        pieces: tensors by name.
        index: leaf -> piece -> [offsets, lengths], for those in several pieces.
        whole: leaf -> (dtype, shape) of all.
    """
    joined = {}
    for leaf, (dtype, shape) in whole.items():
        if leaf not in index:
            if leaf in pieces:
                joined[leaf] = pieces.pop(leaf)
            continue
        joined[leaf] = torch.empty(shape, dtype=dtype)
        for name, (offsets, lengths) in index[leaf].items():
            part(joined[leaf], offsets, lengths).copy_(pieces.pop(name))
    return joined


def part(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the view of a box in a tensor."""
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor
