"""Orders grouped by length: upstream's algorithm, without its fault."""

from __future__ import annotations

import pytest
import torch

from trainer.data.grouped import LengthGrouped

LENGTHS = [(7 * i * i + 3 * i) % 23 for i in range(101)]


@pytest.mark.row(51)
@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (7, 8), (101, 4), (3000, 3)])
def test_length_grouped_is_upstreams_algorithm(n: int, batch_size: int) -> None:
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = [(7 * i * i + 3 * i) % 2003 // 2 for i in range(n)]  # some are equal
    for epoch in range(3):
        theirs = utils.get_length_grouped_indices(
            lengths, batch_size, generator=torch.Generator().manual_seed(6 + epoch)
        )
        assert LengthGrouped(lengths, batch_size, 6).indices(epoch, 0, n).tolist() == theirs


def test_length_grouped_puts_the_longest_first_and_sorts_megabatches() -> None:
    lengths = list(range(100, -1, -1))
    order = LengthGrouped(lengths, batch_size=4, seed=0)
    size = 4 * (101 // 16)
    for epoch in range(5):
        drawn = order.indices(epoch, 0, 101).tolist()
        assert sorted(drawn) == list(range(101))
        assert drawn[0] == 0
        inner = [lengths[i] for i in drawn[1:size]]
        assert inner == sorted(inner, reverse=True)
        assert order.indices(epoch + 1, 0, 101).tolist() != drawn


@pytest.mark.row(194)
def test_length_grouped_shares_agree_after_an_extra_draw_on_one_rank() -> None:
    order = LengthGrouped(LENGTHS, batch_size=4, seed=0)
    rank0 = order.indices(1, 0, 50).tolist()
    torch.rand(1)
    rank1 = LengthGrouped(LENGTHS, batch_size=4, seed=0).indices(1, 50, 101).tolist()
    assert sorted(rank0 + rank1) == list(range(101))


@pytest.mark.row(194)
def test_upstreams_length_grouping_breaks_after_an_extra_draw() -> None:
    """What the test above guards against: upstream draws from the process's global generator."""
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    sampler = utils.LengthGroupedSampler(4, lengths=LENGTHS)
    torch.manual_seed(0)
    rank0 = list(sampler)[:50]
    torch.manual_seed(0)
    torch.rand(1)
    rank1 = list(sampler)[50:]
    assert sorted(rank0 + rank1) != list(range(101))


def test_length_grouped_copies_the_lengths_and_checks_them() -> None:
    lengths = torch.arange(5)
    order = LengthGrouped(lengths, 1, 0)
    lengths.zero_()
    assert order.lengths.tolist() == [0, 1, 2, 3, 4]
    assert LengthGrouped([], 1, 0).indices(0, 0, 0).tolist() == []
    with pytest.raises(ValueError, match=r"one number for each sample, got shape \(2, 1\)"):
        LengthGrouped([[1], [2]], 1, 0)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        LengthGrouped([1], 0, 0)
