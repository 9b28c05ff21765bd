"""``rmsprop`` has the bits of ``torch.optim.RMSprop``."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"centered": True, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.5, "centered": True, "maximize": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equal_bits(
        ts.optim.rmsprop(**options),
        lambda p: torch.optim.RMSprop(p, foreach=True, **options),
        params=make_params(dtype),
        missing=True,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch_by_default_with_a_schedule(options: dict[str, Any]) -> None:
    assert_equal_bits(
        ts.optim.rmsprop(**options),
        lambda p: torch.optim.RMSprop(p, **options),
        rates=lambda step: 0.1 / (step + 1),
        donate=True,
    )


def test_state_holds_what_the_options_need() -> None:
    params = make_params()
    assert set(ts.optim.rmsprop().init(params)) == {"square_avg"}
    full = ts.optim.rmsprop(momentum=0.9, centered=True).init(params)
    assert set(full) == {"square_avg", "momentum_buffer", "grad_avg"}


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_values_out_of_range(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=rf"optim.rmsprop: {name} must be at least 0.0, got -1"):
        ts.optim.rmsprop(**options)
