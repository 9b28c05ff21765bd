"""The padding collator: one call of ``tokenizer.pad`` per batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.collators.base import require_methods, require_rows
from trainer.data.collators.rows import pad_features


@dataclass
class DataCollatorWithPadding:
    """Pads rows to the longest of the batch, and renames ``label`` or ``label_ids`` to ``labels``.

    Args:
        tokenizer: a tokenizer or feature extractor; it decides side, pad value and keys.
        padding: True or "longest" (to the longest row), "max_length" (to ``max_length``, or the
            model's maximum), False or "do_not_pad".
        max_length: the length for padding="max_length".
        pad_to_multiple_of: rounds the padded length up, for hardware that likes multiples of 8.
        return_tensors: passed to ``tokenizer.pad``: "pt", "np", or None for lists.

    Raises TypeError if the tokenizer cannot pad, ValueError on an empty list of rows.
    """

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        require_methods(type(self).__name__, self.tokenizer, "pad")

    def __call__(self, features: Any) -> Any:
        """What ``tokenizer.pad`` makes of the rows, or of a mapping of columns, with ``labels``."""
        if not isinstance(features, Mapping):
            require_rows(type(self).__name__, features)
        batch = pad_features(
            self.tokenizer,
            features,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=self.return_tensors,
        )
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch[name]
                del batch[name]
        return batch
