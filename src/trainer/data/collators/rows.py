"""Helpers of the padding collators: labels out of rows, lists to one width, rows to a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def pad_features(tokenizer: Any, features: Any, **options: Any) -> Any:
    """Calls ``tokenizer.pad`` without its advice to tokenize and pad in one call.

    Fast tokenizers log that advice once, and it makes no sense for a collator. They keep the
    record of it in ``deprecation_warnings``, which is put back afterwards.
    """
    shown = getattr(tokenizer, "deprecation_warnings", None)
    if shown is None:
        return tokenizer.pad(features, **options)
    advice = "Asking-to-pad-a-fast-tokenizer"
    before = shown.get(advice, False)
    shown[advice] = True
    try:
        return tokenizer.pad(features, **options)
    finally:
        shown[advice] = before


def split_labels(
    where: str, features: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Any] | None, list[dict[str, Any]]]:
    """Takes the labels out of rows: (their key, the labels or None, new rows without them).

    The key is ``label`` if the first row has it, else ``labels``; the labels are None if the first
    row has neither. The rows themselves are left as they are. Raises TypeError on rows that are
    not mappings, ValueError if a later row lacks the key of the first.
    """
    require_mappings(where, features)
    name = "label" if "label" in features[0] else "labels"
    rest = [{key: value for key, value in row.items() if key != name} for row in features]
    if name not in features[0]:
        return name, None, rest
    return name, column(where, features, name), rest


def require_mappings(where: str, features: Sequence[Any]) -> None:
    """Raises TypeError naming the first row that is not a mapping."""
    if set(map(type, features)) == {dict}:  # spares most rows the slow check below
        return
    for number, row in enumerate(features):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{where}: row {number} is a {type(row).__name__}; expected a mapping from "
                f"column names to values, as a tokenizer returns it."
            )


def column(where: str, features: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """The values of one key; raises ValueError naming the first row that lacks it."""
    try:
        return [row[name] for row in features]
    except KeyError:
        number, row = next((n, r) for n, r in enumerate(features) if name not in r)
        raise ValueError(
            f"{where}: row {number} lacks the key {name!r}, which every row of the batch needs; it "
            f"has {', '.join(map(repr, row)) or 'no keys'}."
        ) from None


def to_list(values: Any) -> list[Any]:
    """A list of Python values from a tensor, an array or any iterable."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def round_up(length: int, multiple: int | None) -> int:
    """The smallest multiple of ``multiple`` that is at least ``length``; None means 1."""
    return length if multiple is None else -(-length // multiple) * multiple


def pad_lists(
    where: str, rows: Sequence[Sequence[Any]], width: int, value: Any, side: str
) -> list[list[Any]]:
    """Lists of length ``width``, filled with ``value`` on ``side``, "right" or "left".

    Raises ValueError if a row is longer than ``width``.
    """
    padded = []
    for number, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(
                f"{where}: row {number} has {len(row)} labels or token types for a padded length "
                f"of {width} tokens. Truncate them as the tokens are truncated."
            )
        fill = [value] * (width - len(row))
        padded.append([*row, *fill] if side == "right" else [*fill, *row])
    return padded


def stack_token_rows(
    where: str, rows: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None = None
) -> torch.Tensor:
    """Stacks rows of token ids into [batch, length], padded on the tokenizer's side.

    Lists, tuples and arrays become int64; tensors keep their dtype. Raises TypeError on rows that
    are none of these, and ValueError if padding is needed and there is no pad token.
    """
    tensors = [_token_row(where, number, row) for number, row in enumerate(rows)]
    lengths = {row.shape[0] for row in tensors}
    width = round_up(max(lengths), pad_to_multiple_of)
    if lengths == {width}:
        return torch.stack(tensors)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{where}: rows of {min(lengths)} to {max(lengths)} tokens need padding to {width}, "
            f"but the tokenizer ({type(tokenizer).__name__}) does not have a pad token. Set one "
            f"(tokenizer.pad_token = tokenizer.eos_token, say) or make the rows equally long."
        )
    stacked = tensors[0].new_full((len(tensors), width), tokenizer.pad_token_id)
    for line, row in zip(stacked, tensors, strict=True):
        start = 0 if tokenizer.padding_side == "right" else width - row.shape[0]
        line[start : start + row.shape[0]] = row
    return stacked


def _token_row(where: str, number: int, row: Any) -> torch.Tensor:
    got = type(row).__name__
    if isinstance(row, (list, tuple, np.ndarray)):
        try:
            row = torch.tensor(row, dtype=torch.long)
        except (TypeError, ValueError) as error:
            got = f"{got} ({error})"
    if not isinstance(row, torch.Tensor) or row.ndim != 1:
        raise TypeError(
            f"{where}: row {number} must be a one-dimensional sequence of token ids (list, tuple, "
            f"array or tensor) or a mapping with 'input_ids', got {got}. Tokenize the text first."
        )
    return row
