"""The collator for masked language modelling with sentence order prediction (ALBERT)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.collators.language_modeling import DataCollatorForLanguageModeling
from trainer.data.collators.rows import (
    column,
    pad_lists,
    require_mappings,
    stack_token_rows,
    to_list,
)


@dataclass
class DataCollatorForSOP(DataCollatorForLanguageModeling):
    """The deprecated collator that masks tokens and passes on ``sentence_order_label``.

    Rows hold ``input_ids``, ``token_type_ids`` (a sequence of numbers each) and
    ``sentence_order_label`` (a number). The batch holds ``input_ids``, ``labels``,
    ``attention_mask`` (1 for tokens, 0 for padding) and ``token_type_ids``, each int64 [batch,
    length], and ``sentence_order_label`` [batch].

    The arguments are those of DataCollatorForLanguageModeling. In transformers 5.6.1 the class
    drops its arguments and fails when called, and its attention mask is inverted (0 at masked
    tokens, 1 at padding); here it works, and the mask has its usual meaning.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "DataCollatorForSOP is deprecated; use DataCollatorForLanguageModeling.",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)

    def torch_call(self, features: list[Any]) -> dict[str, Any]:
        """The batch as tensors."""
        where = type(self).__name__
        require_mappings(where, features)
        ids = column(where, features, "input_ids")
        padded = stack_token_rows(where, ids, self.tokenizer, self.pad_to_multiple_of)
        input_ids, labels, attention_mask = self.mask_tokens(padded)
        types = [to_list(row) for row in column(where, features, "token_type_ids")]
        pad_type = getattr(self.tokenizer, "pad_token_type_id", 0)
        side = self.tokenizer.padding_side
        order = column(where, features, "sentence_order_label")
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "token_type_ids": torch.tensor(
                pad_lists(where, types, padded.shape[1], pad_type, side), dtype=torch.long
            ),
            "sentence_order_label": torch.stack([torch.as_tensor(label) for label in order]),
        }

    def numpy_call(self, features: list[Any]) -> dict[str, Any]:
        """The batch as arrays."""
        return {key: value.numpy() for key, value in self.torch_call(features).items()}

    def mask_tokens(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks ``inputs`` [batch, length]: (new inputs, labels, attention mask)."""
        attention_mask = torch.ones_like(inputs)
        if self.tokenizer.pad_token_id is not None:
            attention_mask = (inputs != self.tokenizer.pad_token_id).to(inputs.dtype)
        masked, labels = self.torch_mask_tokens(inputs)
        return masked, labels, attention_mask
