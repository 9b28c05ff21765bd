"""``nadam`` has the bits of ``torch.optim.NAdam(foreach=True)``."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"momentum_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equal_bits(
        ts.optim.nadam(**options),
        lambda p: torch.optim.NAdam(p, foreach=True, **options),
        params=make_params(dtype),
        rates=lambda step: 0.1 / (step + 1),
        missing=True,
        donate=True,
    )


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "momentum_decay"])
def test_values_out_of_range(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=rf"optim.nadam: {name} must be at least 0.0, got -1"):
        ts.optim.nadam(**options)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_betas_out_of_range(betas: tuple[float, float]) -> None:
    with pytest.raises(
        ValueError, match=r"optim.nadam: betas\[[01]\] must be in \[0.0, 1.0\), got"
    ):
        ts.optim.nadam(betas=betas)
