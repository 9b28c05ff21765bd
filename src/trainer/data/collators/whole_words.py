"""Words in tokenized text, found from character offsets, for masking whole words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.data.collators.rows import to_list


def stack_offsets(rows: Sequence[Any], length: int, side: str) -> torch.Tensor:
    """Stacks the rows' (start, end) pairs into int64 [batch, length, 2], padded with (0, 0)."""
    stacked = torch.zeros(len(rows), length, 2, dtype=torch.long)
    for line, row in zip(stacked, rows, strict=True):
        pairs = torch.tensor(to_list(row), dtype=torch.long).reshape(-1, 2)
        start = 0 if side == "right" else length - len(pairs)
        line[start : start + len(pairs)] = pairs
    return stacked


def word_starts(offsets: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
    """Which tokens begin a word, bool [batch, length].

    A token that is not special begins a word if its text does not touch the text of the token
    before, or if the token before is special, or at the start of the row.

    Args:
        offsets: [batch, length, 2], first character and one past the last, of each token.
        special: bool [batch, length], the tokens that belong to no word.
    """
    touches = torch.zeros_like(special)
    touches[:, 1:] = (offsets[:, 1:, 0] == offsets[:, :-1, 1]) & ~special[:, :-1]
    # A first token can touch nothing, unless its offsets begin at -1, which no text has.
    return ~special & ~touches


def spread_over_words(
    chosen: torch.Tensor, starts: torch.Tensor, special: torch.Tensor
) -> torch.Tensor:
    """Extends a choice of word starts to all tokens of these words; bool [batch, length] each."""
    word = starts.long().cumsum(dim=1)
    hits = torch.zeros(word.shape[0], word.shape[1] + 1, dtype=torch.long)
    hits.scatter_add_(1, word, chosen.long())
    return (hits.gather(1, word) > 0) & ~special
