"""Which part of a batch is for which member of an ensemble."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from trainstep import tree
from trainstep.batches import split_batch

InAxes = int | None | Mapping[str, int | None]
"""The axis that counts members: None where all get the same, an axis, or either by name."""


def leaf_axes(batch: Any, in_axes: InAxes, members: int) -> list[int | None]:
    """Return the member axis of every leaf of ``batch``, in tree order; None for shared leaves.

    Leaves that are no tensors are shared.

    Raises:
        ValueError: for names that do not fit, or a tensor without an axis of that many members.
        TypeError: for axes by name of a batch that is no dict, or a mapping that is no pytree.
    """
    if in_axes is None:
        return [None] * len(tree.leaves(batch))
    if isinstance(in_axes, Mapping):
        if not isinstance(batch, dict):
            raise TypeError(
                f"ensemble: in_axes names {', '.join(in_axes)}, but the batch is a {type(batch).__name__}; "
                "axes by name are for a dict"
            )
        if batch.keys() != in_axes.keys():
            raise ValueError(
                f"ensemble: in_axes has the names {', '.join(in_axes)}, the batch has {', '.join(batch)}; "
                "give an axis, or None, for every name of the batch"
            )
        return [a for name in batch for a in leaf_axes(batch[name], in_axes[name], members)]
    return [_checked(path, leaf, in_axes, members) for path, leaf in tree.leaves_with_paths(batch)]


def member_batch(batch: Any, in_axes: InAxes, members: int, index: int) -> Any:
    """Return the batch of one member: views."""
    if in_axes is None:
        return batch
    leaves, spec = tree.flatten(batch)
    axes = leaf_axes(batch, in_axes, members)
    picked = [
        leaf if axis is None else leaf.select(axis, index)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return tree.unflatten(picked, spec)


def split_for_members(
    batch: Any, n: int | Literal["iter"], in_axes: InAxes, members: int
) -> Iterable[Any]:
    """Split a batch into micro-batches, each with the member axes of the whole; see ``split_batch``."""
    if n == "iter" or n == 1 or in_axes is None:
        return split_batch(batch, n)
    leaves, spec = tree.flatten(batch)
    axes = leaf_axes(batch, in_axes, members)
    # Split one member's batch to learn (and check) the lengths, then cut the whole likewise.
    parts = [tree.leaves(p) for p in split_batch(member_batch(batch, in_axes, members, 0), n)]
    cut = []
    for place, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        own = [part[place] for part in parts]
        if not isinstance(leaf, Tensor) or own[0].ndim == 0:
            cut.append([leaf] * n)
        else:
            cut.append(list(leaf.split([t.shape[0] for t in own], dim=1 if axis == 0 else 0)))
    return [tree.unflatten(part, spec) for part in zip(*cut, strict=True)]


def _checked(path: str, leaf: Any, axis: int, members: int) -> int | None:
    if isinstance(leaf, Mapping):
        raise TypeError(
            f"ensemble: {path or 'the batch'} is a {type(leaf).__name__}, which cannot be taken apart for "
            "members; give dict(batch)"
        )
    if not isinstance(leaf, Tensor):
        return None
    if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != members:
        raise ValueError(
            f"ensemble: {path or 'the batch'} has shape {tuple(leaf.shape)}; with in_axes={axis} its axis "
            f"{axis} must be {members} long, one entry per member. Use in_axes=None for a batch that all "
            "members share."
        )
    return axis % leaf.ndim
