"""The collator for token classification: a label for each token, padded alongside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.collators.base import DataCollatorMixin, require_kind, require_methods
from trainer.data.collators.rows import pad_features, pad_lists, split_labels, to_list


@dataclass
class DataCollatorForTokenClassification(DataCollatorMixin):
    """Pads inputs, and the labels of each row to the same length on the tokenizer's side.

    Labels are read from ``label`` or else ``labels`` and stay under their key, int64 [batch,
    length]. The arguments are those of DataCollatorWithPadding, and:

    Args:
        label_pad_token_id: fills the labels; -100 is what PyTorch's losses ignore.

    Raises TypeError if the tokenizer cannot pad or rows are not mappings, ValueError on an empty
    list of rows, a row without labels among rows with them, or more labels than padded tokens.
    """

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = -100
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        require_methods(type(self).__name__, self.tokenizer, "pad")
        require_kind(type(self).__name__, self.return_tensors)

    def torch_call(self, features: list[dict[str, Any]]) -> Any:
        """The padded batch as tensors."""
        batch, name, labels = self._pad(features, "pt")
        if labels is not None:
            batch[name] = torch.tensor(labels, dtype=torch.int64)
        return batch

    def numpy_call(self, features: list[dict[str, Any]]) -> Any:
        """The padded batch as arrays."""
        batch, name, labels = self._pad(features, "np")
        if labels is not None:
            batch[name] = np.array(labels, dtype=np.int64)
        return batch

    def _pad(
        self, features: list[dict[str, Any]], kind: str
    ) -> tuple[Any, str, list[list[int]] | None]:
        where = type(self).__name__
        name, labels, rows = split_labels(where, features)
        batch = pad_features(
            self.tokenizer,
            rows,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=kind,
        )
        if labels is None:
            return batch, name, None
        lists = [to_list(label) for label in labels]
        width, side = batch["input_ids"].shape[1], self.tokenizer.padding_side
        return batch, name, pad_lists(where, lists, width, self.label_pad_token_id, side)
