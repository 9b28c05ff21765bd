"""Nested values: tensors in tuples, lists and mappings."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``fn`` to what is no list, tuple or mapping; mappings become plain dicts."""
    if isinstance(value, Mapping):
        return {key: map_leaves(fn, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        parts = [map_leaves(fn, item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return fn(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is no list, tuple or mapping, in order."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(part)
    else:
        yield value


def detached(value: Any) -> Any:
    """Return nested tensors detached from their graph."""
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def compact(value: Any) -> Any:
    """Return nested tensors that keep no more memory alive than they show.

    A slice of the logits, say, would keep all of them; it is copied.
    """
    return map_leaves(_compact, value)


def _compact(leaf: Any) -> Any:
    if type(leaf) is not Tensor or leaf.layout is not torch.strided:
        return leaf
    return leaf.clone() if leaf.untyped_storage().nbytes() > leaf.nbytes else leaf


def to_numpy(value: Any) -> Any:
    """Return nested tensors as NumPy arrays; bfloat16, which NumPy lacks, as float32."""
    return map_leaves(_to_numpy, value)


def _to_numpy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().cpu()
    return (leaf.float() if leaf.dtype is torch.bfloat16 else leaf).numpy()


def plain_numbers(value: Any) -> Any:
    """Turn NumPy scalars and one-element arrays and tensors into numbers, larger ones into lists."""
    return map_leaves(_plain, value)


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, np.generic):
        return leaf.item()
    if isinstance(leaf, np.ndarray | Tensor):
        size = leaf.size if isinstance(leaf, np.ndarray) else leaf.numel()
        return leaf.item() if size == 1 else leaf.tolist()
    return leaf


def batch_length(batch: Any) -> int:
    """Return the samples in a batch: the leading axis of its first tensor; 0 if it has none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, Iterable) and not isinstance(values, str | bytes):
        for value in values:
            if size := batch_length(value):
                return size
    return 0
