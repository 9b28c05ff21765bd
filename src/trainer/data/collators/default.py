"""The default collator: stacks rows of equal shapes, and names the labels ``labels``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.collators.base import DataCollatorMixin, require_kind, require_rows
from trainer.data.collators.rows import column, require_mappings

_LABEL_KEYS = ("label", "label_ids")


def default_data_collator(features: list[Any], return_tensors: str = "pt") -> dict[str, Any]:
    """Stacks rows key by key into tensors ("pt") or arrays ("np") with a leading batch axis.

    Rows are mappings, or objects whose ``vars()`` are taken. The first row decides the keys and the
    kinds of values; its strings and Nones are left out. ``label`` (one number a row) or else
    ``label_ids`` (a sequence a row) becomes ``labels``: int64 if the first label is a Python int
    (or a tensor of integers), else float32. Other values keep their dtype.

    Raises TypeError if ``features`` is not a list of such rows, ValueError if it is empty, if a row
    lacks a key of the first, if shapes differ, or if ``return_tensors`` is unknown.
    """
    where = "default_data_collator"
    require_kind(where, return_tensors)
    require_rows(where, features)
    rows = features
    if not isinstance(features[0], Mapping):
        rows = [_attributes(where, number, row) for number, row in enumerate(features)]
    require_mappings(where, rows)
    first = rows[0]
    batch: dict[str, Any] = {}
    name = next((key for key in _LABEL_KEYS if first.get(key) is not None), None)
    if name is not None:
        batch["labels"] = _stack(where, name, column(where, rows, name), return_tensors)
    for key, value in first.items():
        if key not in _LABEL_KEYS and value is not None and not isinstance(value, str):
            batch[key] = _stack(where, key, column(where, rows, key), return_tensors)
    return batch


@dataclass
class DefaultDataCollator(DataCollatorMixin):
    """:func:`default_data_collator` as an object that remembers ``return_tensors``."""

    return_tensors: str = "pt"

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """Collates ``features``; ``return_tensors``, if given, goes before the attribute."""
        kind = self.return_tensors if return_tensors is None else return_tensors
        return default_data_collator(features, kind)


def _attributes(where: str, number: int, row: Any) -> dict[str, Any]:
    if not hasattr(row, "__dict__"):
        raise TypeError(
            f"{where}: row {number} is a {type(row).__name__}; expected a mapping or an object "
            f"with attributes. Let the dataset return a dict, or pass a data_collator of your own."
        )
    return vars(row)


def _stack(where: str, key: str, values: list[Any], kind: str) -> Any:
    try:
        return _stack_torch(key, values) if kind == "pt" else _stack_numpy(key, values)
    except (ValueError, TypeError, RuntimeError) as error:
        shapes = [str(getattr(v, "shape", None) or _length(v)) for v in values[:4]]
        raise ValueError(
            f"{where}: the values of {key!r} do not stack; the first rows have {', '.join(shapes)} "
            f"({type(values[0]).__name__}). Pad them, as DataCollatorWithPadding does, or remove "
            f"the column. ({error})"
        ) from error


def _length(value: Any) -> str:
    return f"length {len(value)}" if hasattr(value, "__len__") else f"the value {value!r}"


def _is_whole(key: str, first: Any) -> bool:
    """Whether labels are integers, judged on the first row."""
    if key == "label":
        return isinstance(first, int)
    return len(first) > 0 and isinstance(first[0], int)


def _stack_torch(key: str, values: list[Any]) -> torch.Tensor:
    first = values[0]
    if key in _LABEL_KEYS and not (key == "label_ids" and isinstance(first, torch.Tensor)):
        scalar = isinstance(first, torch.Tensor) or (
            isinstance(first, np.ndarray) and first.ndim == 0
        )
        dtype = torch.long if _is_whole(key, first.item() if scalar else first) else torch.float
        if isinstance(first, np.ndarray):  # from a list of arrays, torch.tensor is slow and warns
            return torch.from_numpy(np.stack(values)).to(dtype)
        return torch.tensor(values, dtype=dtype)
    if isinstance(first, torch.Tensor):
        return torch.stack(values)
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(values))
    return torch.tensor(values)


def _stack_numpy(key: str, values: list[Any]) -> np.ndarray:
    first = values[0]
    if key in _LABEL_KEYS and not (key == "label_ids" and isinstance(first, np.ndarray)):
        scalar = key == "label" and isinstance(first, np.ndarray)
        dtype = np.int64 if _is_whole(key, first.item() if scalar else first) else np.float32
        return np.array(values, dtype=dtype)
    return np.stack(values) if isinstance(first, np.ndarray) else np.array(values)
