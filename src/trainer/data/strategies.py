"""The orders that ``train_sampling_strategy`` names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.data.grouped import LengthGrouped
from trainer.data.order import Feistel, Order, Permutation, Sequential

STRATEGIES = ("random", "sequential", "group_by_length", "feistel")


def for_strategy(
    strategy: str,
    n: int,
    *,
    seed: int,
    lengths: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
) -> Order:
    """The order that ``train_sampling_strategy`` names, over ``n`` samples.

    Args:
        strategy: One of `STRATEGIES`.
        n: Samples in the dataset.
        seed: ``data_seed``, or ``seed`` where that is None.
        lengths: The ``n`` sample lengths; needed by "group_by_length" only.
        batch_size: Samples a rank consumes in an update; needed by "group_by_length" only.

    Raises:
        ValueError: Unknown strategy, or "group_by_length" without what it needs.
    """
    if strategy == "random":
        return Permutation(n, seed)
    if strategy == "sequential":
        return Sequential(n)
    if strategy == "feistel":
        return Feistel(n, seed)
    if strategy != "group_by_length":
        raise ValueError(
            f"train_sampling_strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}."
        )
    if lengths is None or batch_size is None or len(lengths) != n:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' needs a batch size and one length for each "
            f"of the {n} samples, got batch_size={batch_size} and "
            f"{'no' if lengths is None else len(lengths)} lengths."
        )
    return LengthGrouped(lengths, batch_size, seed)
