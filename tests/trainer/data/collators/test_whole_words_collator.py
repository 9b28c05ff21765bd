"""Words from offsets."""

from __future__ import annotations

import torch

from trainer.data.collators.whole_words import spread_over_words, stack_offsets, word_starts

# [CLS] un ##do that , [SEP] [PAD]
OFFSETS = torch.tensor([[(0, 0), (0, 2), (2, 4), (5, 9), (9, 10), (0, 0), (0, 0)]])
SPECIAL = torch.tensor([[True, False, False, False, False, True, True]])


def test_words_start_after_gaps_and_special_tokens():
    assert word_starts(OFFSETS, SPECIAL).int().tolist() == [[0, 1, 0, 1, 0, 0, 0]]


def test_a_row_may_start_with_a_word_at_character_zero():
    starts = word_starts(torch.tensor([[(0, 2), (2, 3), (0, 1)]]), torch.zeros(1, 3).bool())
    assert starts.int().tolist() == [[1, 0, 1]]


def test_a_choice_spreads_over_its_word_only():
    starts = word_starts(OFFSETS, SPECIAL)
    chosen = torch.tensor([[0, 0, 0, 1, 0, 0, 0]]).bool()
    assert spread_over_words(chosen, starts, SPECIAL).int().tolist() == [[0, 0, 0, 1, 1, 0, 0]]
    chosen = torch.tensor([[0, 1, 0, 0, 0, 0, 0]]).bool()
    assert spread_over_words(chosen, starts, SPECIAL).int().tolist() == [[0, 1, 1, 0, 0, 0, 0]]


def test_offsets_are_padded_on_each_side():
    rows = [[(0, 2), (2, 3)], torch.tensor([[4, 5]])]
    assert stack_offsets(rows, 3, "right").tolist() == [
        [[0, 2], [2, 3], [0, 0]],
        [[4, 5], [0, 0], [0, 0]],
    ]
    assert stack_offsets(rows, 3, "left")[1].tolist() == [[0, 0], [0, 0], [4, 5]]
