"""The collator for sequence-to-sequence models: labels have a length of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.collators.base import require_methods, require_rows
from trainer.data.collators.rows import pad_features, pad_lists, round_up, split_labels, to_list


@dataclass
class DataCollatorForSeq2Seq:
    """Pads inputs, pads labels to their own length, and derives ``decoder_input_ids``.

    Labels are read from ``label`` or else ``labels`` and become ``labels``, int64 [batch, label
    length], or None if no row has any. Their length is that of the longest, or ``max_length`` for
    padding="max_length", rounded up to ``pad_to_multiple_of``; longer labels are never cut.
    The arguments are those of DataCollatorWithPadding, and:

    Args:
        model: if it has ``prepare_decoder_input_ids_from_labels``, the batch gets its result as
            ``decoder_input_ids`` (which spares a label-smoothed loss from computing it twice).
        label_pad_token_id: fills the labels; -100 is what PyTorch's losses ignore.

    Raises TypeError if the tokenizer cannot pad or rows are not mappings, ValueError on an empty
    list of rows, on rows some of which lack labels, or on unequal labels without padding.
    """

    tokenizer: Any
    model: Any = None
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = -100
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        require_methods(type(self).__name__, self.tokenizer, "pad")

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        """Collates ``features``; ``return_tensors``, if given, goes before the attribute."""
        where = type(self).__name__
        kind = self.return_tensors if return_tensors is None else return_tensors
        require_rows(where, features)
        _, labels, rows = split_labels(where, features)
        batch = pad_features(
            self.tokenizer,
            rows,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=kind,
        )
        if labels is None or all(label is None for label in labels):
            batch["labels"] = None
            return batch
        padded = self._pad_labels(labels)
        batch["labels"] = (
            torch.tensor(padded, dtype=torch.int64)
            if kind == "pt"
            else np.array(padded, dtype=np.int64)
        )
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            derive = self.model.prepare_decoder_input_ids_from_labels
            batch["decoder_input_ids"] = derive(labels=batch["labels"])
        return batch

    def _pad_labels(self, labels: list[Any]) -> list[list[Any]]:
        where = type(self).__name__
        missing = [number for number, label in enumerate(labels) if label is None]
        if missing:
            raise ValueError(
                f"{where}: row {missing[0]} has no labels (None) while others have. "
                f"Give all rows of a batch labels, or none."
            )
        lists = [to_list(label) for label in labels]
        lengths = [len(row) for row in lists]
        # transformers' PaddingStrategy is a str, so that its members equal these names.
        if self.padding is False or self.padding == "do_not_pad":
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"{where}: labels of {min(lengths)} to {max(lengths)} tokens do not form a "
                    f"tensor without padding. Use padding=True, or make them equally long."
                )
            return lists
        width = max(lengths)
        if self.padding == "max_length" and self.max_length is not None:
            width = self.max_length
        width = round_up(width, self.pad_to_multiple_of)
        width = max(width, *lengths)
        side = self.tokenizer.padding_side
        return pad_lists(where, lists, width, self.label_pad_token_id, side)
