"""The collator for multiple choice: rows that hold several encoded choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.collators.base import DataCollatorMixin, require_kind, require_methods
from trainer.data.collators.rows import pad_features, split_labels


@dataclass
class DataCollatorForMultipleChoice(DataCollatorMixin):
    """Pads all choices of all rows alike and returns them as [batch, choices, length].

    A row maps each key to a list with one sequence a choice, and ``label`` or ``labels`` to the
    number of the right choice, which becomes ``labels``, int64 [batch]; rows to predict may lack
    it. The arguments are those of DataCollatorWithPadding.

    Raises TypeError if the tokenizer cannot pad or rows are not mappings, ValueError on an empty
    list of rows or on rows with different numbers of choices.
    """

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        require_methods(type(self).__name__, self.tokenizer, "pad")
        require_kind(type(self).__name__, self.return_tensors)

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as tensors."""
        batch, labels = self._pad(features, "pt")
        if labels is not None:
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch

    def numpy_call(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as arrays."""
        batch, labels = self._pad(features, "np")
        if labels is not None:
            batch["labels"] = np.array(labels, dtype=np.int64)
        return batch

    def _pad(
        self, features: list[dict[str, Any]], kind: str
    ) -> tuple[dict[str, Any], list[Any] | None]:
        _, labels, rows = split_labels(type(self).__name__, features)
        choices = len(rows[0]["input_ids"])
        self._check_choices(rows, choices)
        flat = [{k: value[i] for k, value in row.items()} for row in rows for i in range(choices)]
        padded = pad_features(
            self.tokenizer,
            flat,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=kind,
        )
        shape = (len(rows), choices, -1)
        return {key: value.reshape(shape) for key, value in padded.items()}, labels

    def _check_choices(self, rows: list[dict[str, Any]], choices: int) -> None:
        for number, row in enumerate(rows):
            for key, value in row.items():
                if len(value) != choices:
                    raise ValueError(
                        f"{type(self).__name__}: row {number} has {len(value)} choices in {key!r}, "
                        f"row 0 has {choices} in 'input_ids'. All rows of a batch need as many."
                    )
