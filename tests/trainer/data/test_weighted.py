"""Weighted orders: those of torch's sampler, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from trainer.data.weighted import Weighted


@pytest.mark.parametrize(("replacement", "count"), [(True, 50), (False, 6)])
def test_weighted_equals_torchs_sampler(replacement: bool, count: int) -> None:
    weights = [0.5, 3.0, 0.0, 1.0, 1.0, 2.0, 0.25]
    ours = Weighted(weights, seed=8, replacement=replacement, num_samples=count)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(8 + epoch)
        theirs = torch.utils.data.WeightedRandomSampler(weights, count, replacement, generator)
        assert ours.indices(epoch, 0, count).tolist() == list(theirs)


def test_weighted_draws_as_many_as_there_are_weights_by_default() -> None:
    assert len(Weighted([1, 2, 3], seed=0)) == 3


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [float("nan")], [[1.0]], []])
def test_weighted_refuses_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="1-D sequence of finite numbers of at least 0"):
        Weighted(weights, seed=0)


def test_weighted_refuses_to_draw_more_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"at most 2 samples .* got num_samples=3"):
        Weighted([1.0, 2.0, 0.0], seed=0, replacement=False)
