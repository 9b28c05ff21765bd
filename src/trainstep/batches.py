"""A batch as micro-batches."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from trainstep import tree


def split_batch(batch: Any, n: int | Literal["iter"]) -> Iterable[Any]:
    """Split a batch into micro-batches: views along the leading axis of every tensor and NumPy array.

    The first parts are one longer where ``n`` does not divide the length. Lists of plain values (texts,
    ids) that are as long as the leading axis are split likewise; everything else goes to every part.
    Mappings that are no dicts, such as a tokenizer's ``BatchEncoding``, become dicts.

    Raises:
        ValueError: if leading axes differ, or are shorter than ``n``.
    """
    if n == "iter":
        return batch
    if n == 1:
        return [batch]
    batch = tree.plain(batch)
    leaves, spec = tree.flatten(batch, _is_column)
    sizes = {leaf.shape[0] for leaf in leaves if _is_array(leaf) and leaf.ndim}
    if len(sizes) != 1 or min(sizes) < n:
        shapes = ", ".join(
            f"{path}: {tuple(leaf.shape)}"
            for path, leaf in tree.leaves_with_paths(batch)
            if _is_array(leaf)
        )
        raise ValueError(
            f"make_step(microbatches={n}): every tensor of the batch needs the same leading axis, "
            f"at least {n} long; got {shapes or 'no tensors'}"
        )
    (size,) = sizes
    parts = [_parts(leaf, n, size) for leaf in leaves]
    return [tree.unflatten(part, spec) for part in zip(*parts, strict=True)]


def _parts(leaf: Any, n: int, size: int) -> Sequence[Any]:
    if isinstance(leaf, Tensor) and leaf.ndim:
        return leaf.tensor_split(n)
    if isinstance(leaf, np.ndarray) and leaf.ndim:
        return np.array_split(leaf, n)
    if isinstance(leaf, list) and len(leaf) == size:
        return [[leaf[i] for i in places] for places in np.array_split(np.arange(size), n)]
    return [leaf] * n


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray)


def _is_column(node: Any) -> bool:
    """Tell whether a node is a list of values without axes, rather than a container of tensors."""
    return isinstance(node, list) and not any(map(_is_array, tree.leaves(node)))
