"""Pytrees: nested dicts, lists, tuples and registered records with tensors at the leaves.

PyTorch has no public pytree module; this file is the only one that touches ``torch.utils._pytree``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from trainstep import sharded

PyTree = Any

leaves: Callable[[PyTree], list[Any]] = _pytree.tree_leaves
flatten: Callable[..., tuple[list[Any], Any]] = _pytree.tree_flatten
unflatten: Callable[[Iterable[Any], Any], PyTree] = _pytree.tree_unflatten
map: Callable[..., PyTree] = _pytree.tree_map


def register(
    cls: type,
    names: tuple[str, ...],
    split: Callable[[Any], tuple[list[Any], Any]],
    join: Callable[[Iterable[Any], Any], Any],
) -> None:
    """Make ``cls`` a pytree node.

    Args:
        cls: the record type.
        names: the name of each child, used in paths.
        split: record -> (children, static context).
        join: (children, static context) -> record.
    """
    keys = [_pytree.GetAttrKey(name) for name in names]

    def split_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = split(node)
        return list(zip(keys, children, strict=True)), context

    _pytree.register_pytree_node(
        cls,
        split,
        join,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=split_with_keys,
    )


def path_string(path: Iterable[Any]) -> str:
    """Join the keys of a path with slashes: ``params/blocks.0.weight``."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    )


def leaves_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return ``(path, leaf)`` for every leaf, in tree order; nodes that are ``is_leaf`` stay whole."""
    flat, _ = _pytree.tree_flatten_with_path(tree, is_leaf)
    return [(path_string(path), leaf) for path, leaf in flat]


def clone(tree: PyTree) -> PyTree:
    """Copy every tensor; other leaves are shared."""
    if type(tree) is dict:  # the common case, without the pytree machinery's cost per node
        return {name: clone(value) for name, value in tree.items()}
    if isinstance(tree, Tensor):
        return tree.clone()
    return map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def plain(tree: PyTree) -> PyTree:
    """Turn mappings that are no pytree nodes (a ``UserDict``, a ``BatchEncoding``) into dicts."""
    return map(lambda leaf: plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, tree)


def batch_size(batch: PyTree) -> int:
    """Return the length of the leading axis of a batch.

    Returns:
        The leading length of the first tensor with at least one axis, else of the first such NumPy array; 1
        if there is none.
    """
    if isinstance(batch, Mapping):  # no full flatten for a dict; others are no pytree nodes
        for value in batch.values():
            if isinstance(value, Tensor) and value.ndim:
                return value.shape[0]
    flat = leaves(plain(batch))
    for kind in (Tensor, np.ndarray):
        for leaf in flat:
            if isinstance(leaf, kind) and leaf.ndim:
                return int(leaf.shape[0])
    return 1


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries of all tensors, without a host sync.

    Computed as the norm of the per-tensor norms, as ``torch.nn.utils.clip_grad_norm_`` does, so that
    it has the same bits. Tensors of several devices are brought to the first one's. Of tensors that
    processes hold in parts all entries count, wherever they are.

    Returns:
        A zero-dimensional tensor; zero if there are no tensors.
    """
    norms: list[Tensor] = []
    groups = by_device_and_dtype(list(tensors))
    for group in groups:
        parts = any(sharded.is_sharded(tensor) for tensor in group)
        norms.extend(sharded.norms(group) if parts else torch._foreach_norm(group))
    if not norms:
        return torch.zeros(())
    if len(groups) > 1:
        device = norms[0].device
        norms = [norm.to(device) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


def by_device_and_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Split a list into runs that multi-tensor kernels accept, keeping the order within a run."""
    if not tensors:
        return []
    first = tensors[0]
    device, dtype = first.device, first.dtype
    if all(t.dtype == dtype and t.device == device for t in tensors):
        return [tensors]
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())
