"""The order of samples that are drawn with given probabilities."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from trainer.data.order import _at_least, _generator, _Latest, _Materialised

_MULTINOMIAL_LIMIT = 1 << 24


def _weights(values: Any) -> Tensor:
    weights = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
    bad = weights.ndim != 1 or not bool(torch.isfinite(weights).all())
    if bad or bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError(
            "Weighted: weights must be a 1-D sequence of finite numbers of at least 0, one of them "
            f"above 0; got shape {tuple(weights.shape)}, {weights}."
        )
    if len(weights) > _MULTINOMIAL_LIMIT:
        raise ValueError(
            f"Weighted: torch.multinomial takes at most 2**24 weights, got {len(weights)}."
        )
    return weights


@attrs.frozen(eq=False)
class Weighted(_Materialised):
    """Samples drawn with probability proportional to ``weights``.

    Equal to ``torch.utils.data.WeightedRandomSampler`` with a generator seeded ``seed + epoch``.

    Args:
        weights: One number for each sample, at least 0; they need not sum to one.
        seed: Seed of the run's data order.
        replacement: False draws no sample twice in an epoch.
        num_samples: Draws an epoch; the number of weights by default.
    """

    weights: Tensor = attrs.field(converter=_weights)
    seed: int
    replacement: bool = True
    num_samples: int = attrs.field(validator=_at_least(0))
    _latest: _Latest = attrs.field(factory=_Latest, init=False, repr=False, eq=False)

    @num_samples.default
    def _all_samples(self) -> int:
        return len(self.weights)

    def __attrs_post_init__(self) -> None:
        available = int((self.weights > 0).sum())
        if not self.replacement and self.num_samples > available:
            raise ValueError(
                f"Weighted: without replacement at most {available} samples (those of a weight "
                f"above 0) can be drawn, got num_samples={self.num_samples}."
            )

    def __len__(self) -> int:
        return self.num_samples

    def _draw(self, epoch: int) -> Tensor:
        if self.num_samples == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        generator = _generator(self.seed, epoch)
        return torch.multinomial(
            self.weights, self.num_samples, self.replacement, generator=generator
        )
