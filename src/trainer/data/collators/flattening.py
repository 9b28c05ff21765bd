"""The padding-free collator: all rows in one long sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.collators.base import require_kind, require_rows
from trainer.data.collators.default import DefaultDataCollator
from trainer.data.collators.rows import column, require_mappings, to_list


@dataclass
class DataCollatorWithFlattening(DefaultDataCollator):
    """Concatenates the rows of a batch into one sequence of shape [1, total], without padding.

    The batch holds ``input_ids`` and ``labels`` (the rows' own, else the input ids), where the
    first label of each row is ``separator_id``, so that no row is predicted from the one before.
    The attention of the model must keep rows apart, by one of the following.

    Args:
        return_tensors: "pt" or "np".
        return_position_ids: adds ``position_ids``, which start at 0 in each row.
        separator_id: the first label of each row.
        return_flash_attn_kwargs: adds ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32 [rows + 1],
            where each row starts and the last ends) and ``max_length_q`` and ``max_length_k``
            (Python ints), as flash attention's variable-length kernels take them.
        return_seq_idx: adds ``seq_idx``, int32 [1, total], the row's number for each token.

    Ids, labels and positions are int64. Raises TypeError if rows are not mappings, ValueError on
    an empty list of rows, a row without ``input_ids``, or labels and ids of unequal lengths.
    """

    def __init__(
        self,
        *args: Any,
        return_position_ids: bool = True,
        separator_id: int = -100,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.return_position_ids = return_position_ids
        self.separator_id = separator_id
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx

    def __call__(
        self,
        features: list[Any],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> dict[str, Any]:
        """Collates ``features``; the arguments, if given, go before the attributes."""
        where = type(self).__name__
        kind = require_kind(where, return_tensors, self.return_tensors)
        require_rows(where, features)
        separator = self.separator_id if separator_id is None else separator_id
        require_mappings(where, features)
        ids = _lists(where, features, "input_ids")
        labels = _lists(where, features, "labels") if "labels" in features[0] else ids
        _check_lengths(where, ids, labels)
        lengths = [len(row) for row in ids]

        def line(rows: list[Any], dtype: str = "int64") -> Any:
            return _array([[value for row in rows for value in row]], kind, dtype)

        batch = {
            "input_ids": line(ids),
            "labels": line([[separator, *row[1:]] if row else [] for row in labels]),
        }
        if self.return_position_ids:
            batch["position_ids"] = line([range(length) for length in lengths])
        if self.return_seq_idx:
            numbers = [[number] * length for number, length in enumerate(lengths)]
            batch["seq_idx"] = line(numbers, "int32")
        if self.return_flash_attn_kwargs:
            starts = np.cumsum([0, *lengths]).tolist()
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = _array(starts, kind, "int32")
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch


def _lists(where: str, features: list[Any], name: str) -> list[list[int]]:
    return [to_list(row) for row in column(where, features, name)]


def _check_lengths(where: str, ids: list[list[int]], labels: list[list[int]]) -> None:
    for number, (row, targets) in enumerate(zip(ids, labels, strict=True)):
        if len(row) != len(targets):
            raise ValueError(
                f"{where}: row {number} has {len(row)} input_ids and {len(targets)} labels; "
                f"a causal model's labels are as many as its tokens."
            )


def _array(values: list[Any], kind: str, dtype: str) -> Any:
    if kind == "pt":
        return torch.tensor(values, dtype=getattr(torch, dtype))
    return np.array(values, dtype=dtype)
