"""Orders by the names that the arguments have for them."""

from __future__ import annotations

import pytest

from trainer.data.grouped import LengthGrouped
from trainer.data.order import Feistel, Permutation, Sequential
from trainer.data.strategies import for_strategy


@pytest.mark.row(51)
def test_each_strategy_gives_its_order() -> None:
    assert for_strategy("random", 9, seed=1) == Permutation(9, 1)
    assert for_strategy("sequential", 9, seed=1) == Sequential(9)
    assert for_strategy("feistel", 9, seed=1) == Feistel(9, 1)
    lengths = list(range(9))
    grouped = for_strategy("group_by_length", 9, seed=1, lengths=lengths, batch_size=2)
    expected = LengthGrouped(lengths, 2, 1)
    assert grouped.indices(0, 0, 9).tolist() == expected.indices(0, 0, 9).tolist()


def test_an_unknown_strategy_lists_the_valid_ones() -> None:
    message = "expected one of random, sequential, group_by_length, feistel, got 'sorted'"
    with pytest.raises(ValueError, match=message):
        for_strategy("sorted", 9, seed=1)


def test_grouping_by_length_needs_all_lengths() -> None:
    with pytest.raises(ValueError, match="each of the 9 samples, got batch_size=2 and no lengths"):
        for_strategy("group_by_length", 9, seed=1, batch_size=2)
    with pytest.raises(ValueError, match="got batch_size=2 and 1 lengths"):
        for_strategy("group_by_length", 9, seed=1, batch_size=2, lengths=[1])
