"""Sample lengths, for grouping by length: from a column, or the length of each model input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.seeding import has_transform, preserved_host_rng

_CHUNK = 1000


def sample_lengths(
    dataset: Any, *, length_column: str | None = "length", input_name: str | None = None
) -> list[int]:
    """The length of every sample of ``dataset``, in order.

    A dataset with columns (``column_names``, as ``datasets.Dataset`` has) that contain
    ``length_column`` gives its values; otherwise a sample's length is
    ``len(sample[input_name])``. A column is read without decoding the others. A dataset without
    columns, or with a transform, is read sample by sample; ``len(dataset)`` says where it ends,
    never an IndexError, and the global random generators are left as they were.

    Args:
        dataset: A map-style dataset with a length.
        length_column: Name of the column of lengths; None looks for none.
        input_name: The model's first input; "input_ids" by default.

    Raises:
        ValueError: The dataset has no length; a sample is not a mapping, lacks ``input_name``, or
            holds something there that has no length.
    """
    name = input_name or "input_ids"
    try:
        n = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"group_by_length: expected a dataset with a length, got {type(dataset).__name__}, "
            "whose len() fails. Use train_sampling_strategy='random' or 'sequential'."
        ) from error
    columns = _columns(dataset)
    with preserved_host_rng():
        if length_column is not None and length_column in columns:
            return [int(length) for length in _column(dataset, length_column)]
        if name in columns and not has_transform(dataset):
            return [_length(value, i, name) for i, value in enumerate(_column(dataset, name))]
        return [_length(_value(dataset[i], i, name), i, name) for i in range(n)]


def _columns(dataset: Any) -> list[str]:
    """Column names; a `DatasetDict`'s mapping of splits, or nothing, counts as none."""
    names = getattr(dataset, "column_names", None)
    return list(names) if isinstance(names, list | tuple) else []


def _column(dataset: Any, name: str) -> Iterator[Any]:
    """The values of one column, read in chunks where possible: all may not fit in memory."""
    if not hasattr(dataset, "select_columns"):
        yield from dataset[name]
        return
    narrow = dataset.select_columns([name])
    if has_transform(narrow):  # it may need the other columns, and does not make this one
        narrow = narrow.with_format(None)
    for start in range(0, len(narrow), _CHUNK):
        yield from narrow[start : min(start + _CHUNK, len(narrow))][name]


def _value(sample: Any, i: int, name: str) -> Any:
    if isinstance(sample, Mapping) and name in sample:
        return sample[name]
    keys = f" with the keys {sorted(map(str, sample))}" if isinstance(sample, Mapping) else ""
    raise ValueError(
        "group_by_length: lengths can only be inferred from samples that are mappings with the "
        f"key {name!r}; sample {i} is a {type(sample).__name__}{keys}. Add a column of lengths and "
        "name it in length_column_name, or use another train_sampling_strategy."
    )


def _length(value: Any, i: int, name: str) -> int:
    try:
        return len(value)
    except TypeError as error:
        raise ValueError(
            f"group_by_length: expected a sequence in {name!r} of sample {i}, got "
            f"{type(value).__name__}, which has no length. Add a column of lengths and name it in "
            "length_column_name, or use another train_sampling_strategy."
        ) from error
