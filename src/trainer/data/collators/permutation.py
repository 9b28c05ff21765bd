"""The collator for permutation language modelling (XLNet)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.collators.base import DataCollatorMixin, require_kind, require_mask_token
from trainer.data.collators.positioned import RandomCollatorMixin
from trainer.data.collators.rows import column, require_mappings, stack_token_rows


@dataclass
class DataCollatorForPermutationLanguageModeling(RandomCollatorMixin, DataCollatorMixin):
    """Masks spans and draws a factorisation order (Yang et al., XLNet, 2019).

    Rows are mappings with ``input_ids`` or sequences of token ids. The batch holds ``input_ids``
    (the chosen tokens replaced by the mask token) and ``labels`` (-100 except at the chosen),
    int64 [batch, length]; ``perm_mask`` float32 [batch, length, length], 1 where token i may not
    attend to token j; and ``target_mapping``, an identity matrix for each row.

    Spans: with a span of n tokens, n uniform in 1..max_span_length, goes a context of
    n / plm_probability tokens, in which the span starts anywhere; contexts fill the row. Special
    and pad tokens are never chosen.

    Args:
        tokenizer: knows its mask, pad and special tokens.
        plm_probability: the share of a context that its span takes, in (0, 1].
        max_span_length: the longest span, in tokens, at least 1.
        return_tensors: "pt" or "np"; the random choices are the same for both.

    Raises ValueError at construction on a tokenizer without mask token and on values out of range;
    at a call on rows of unequal lengths without a pad token, and on an odd (padded) length: one
    half of a row is taken to be the memory of the other, and they are permuted alike.
    """

    tokenizer: Any
    plm_probability: float = 1 / 6
    max_span_length: int = 5
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        where = type(self).__name__
        require_kind(where, self.return_tensors)
        require_mask_token(where, self.tokenizer, "Add one to use permutation language modelling.")
        if not 0 < self.plm_probability <= 1:
            raise ValueError(
                f"{where}: plm_probability must be above 0 and at most 1, "
                f"got {self.plm_probability!r}."
            )
        if self.max_span_length < 1:
            raise ValueError(
                f"{where}: max_span_length must be at least 1, got {self.max_span_length!r}."
            )

    def torch_call(self, features: list[Any]) -> dict[str, Any]:
        """The batch as tensors."""
        where = type(self).__name__
        if isinstance(features[0], Mapping):
            require_mappings(where, features)
            features = column(where, features, "input_ids")
        padded = stack_token_rows(where, features, self.tokenizer)
        names = ("input_ids", "perm_mask", "target_mapping", "labels")
        return dict(zip(names, self.torch_mask_tokens(padded), strict=True))

    def numpy_call(self, features: list[Any]) -> dict[str, Any]:
        """The batch as arrays."""
        return {key: value.numpy() for key, value in self.torch_call(features).items()}

    def torch_mask_tokens(
        self, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks ``inputs`` [batch, length]: (new inputs, perm_mask, target_mapping, labels)."""
        batch, length = inputs.shape
        if length % 2 != 0:
            raise ValueError(
                f"{type(self).__name__}: rows must have an even number of tokens, got {length}; "
                f"the two halves of a row are permuted alike. Pad or cut the rows."
            )
        generator = self._generator()
        ask = self.tokenizer.get_special_tokens_mask
        special = torch.tensor(
            [ask(row, already_has_special_tokens=True) for row in inputs.tolist()]
        ).bool()
        if self.tokenizer.pad_token is not None:
            special |= inputs == self.tokenizer.pad_token_id
        spans = torch.stack([self._spans(length, generator) for _ in range(batch)])
        chosen = spans & ~special
        perm_mask = torch.stack(
            [
                _hidden(_order(length, generator), row, ~row & ~functional)
                for row, functional in zip(chosen, special, strict=True)
            ]
        )
        target_mapping = torch.eye(length).repeat(batch, 1, 1)
        masked = inputs.masked_fill(chosen, self.tokenizer.mask_token_id)
        labels = inputs.masked_fill(~chosen, -100)
        return masked.long(), perm_mask, target_mapping, labels.long()

    def _spans(self, length: int, generator: torch.Generator | None) -> torch.Tensor:
        """The tokens of one row that lie in spans, bool [length]."""
        inside = torch.zeros(length, dtype=torch.bool)
        start = 0
        while start < length:
            span = _draw(1, self.max_span_length + 1, generator)
            context = int(span / self.plm_probability)
            first = start + _draw(0, context - span + 1, generator)
            inside[first : first + span] = True
            start += context
        return inside


def _draw(low: int, high: int, generator: torch.Generator | None) -> int:
    """A uniform integer of [low, high)."""
    return int(torch.randint(low, high, (1,), generator=generator))


def _order(length: int, generator: torch.Generator | None) -> torch.Tensor:
    """A rank for each token of a row: both halves in one random order, the second behind the first.

    The first half serves as the memory of the second, and tokens must not see, through it, what the
    order hides; hence the halves are not mixed.
    """
    half = length // 2
    shuffled = torch.randperm(half, generator=generator)
    return torch.cat([shuffled, shuffled + half])


def _hidden(rank: torch.Tensor, chosen: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The mask of one row, float32 [length, length]: 1 where token i may not attend to token j.

    Token i sees a chosen token j only if j comes earlier in the order. Tokens that are not chosen
    are seen by all; the ``plain`` ones among them (not special) come first in the order, so that
    they see no chosen token.
    """
    rank = rank.masked_fill(plain, -1)
    return ((rank[:, None] <= rank[None, :]) & chosen[None, :]).float()
