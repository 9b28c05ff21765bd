"""A batch as micro-batches."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from trainstep import tree


def split_batch(batch: Any, n: int | Literal["iter"]) -> Iterable[Any]:
    """Split a batch into micro-batches: views along the leading axis of every tensor.

    The first parts are one longer where ``n`` does not divide the length. Leaves without a leading
    axis go to every part.

    Raises:
        ValueError: if leading axes differ, or are shorter than ``n``.
    """
    if n == "iter":
        return batch
    if n == 1:
        return [batch]
    leaves, spec = tree.flatten(batch)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1 or min(sizes) < n:
        shapes = ", ".join(
            f"{path}: {tuple(leaf.shape)}"
            for path, leaf in tree.leaves_with_paths(batch)
            if isinstance(leaf, Tensor)
        )
        raise ValueError(
            f"make_step(microbatches={n}): every tensor of the batch needs the same leading axis, "
            f"at least {n} long; got {shapes or 'no tensors'}"
        )
    parts = [
        leaf.tensor_split(n) if isinstance(leaf, Tensor) and leaf.ndim else [leaf] * n
        for leaf in leaves
    ]
    return [tree.unflatten(part, spec) for part in zip(*parts, strict=True)]
