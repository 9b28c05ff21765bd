"""``adagrad`` has the bits of ``torch.optim.Adagrad``."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "lr_decay": 0.1},
    {"initial_accumulator_value": 0.5, "eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "lr_decay": 0.01, "maximize": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equal_bits(
        ts.optim.adagrad(**options),
        lambda p: torch.optim.Adagrad(p, foreach=True, **options),
        params=make_params(dtype),
        rates=lambda step: 0.1 / (step + 1),
        missing=True,
        donate=True,
    )


def test_state_starts_from_the_initial_value_and_counts_only_for_lr_decay() -> None:
    params = make_params()
    state = ts.optim.adagrad(initial_accumulator_value=0.5).init(params)
    assert set(state) == {"sum"}
    assert all(bool((total == 0.5).all()) for total in state["sum"].values())
    assert set(ts.optim.adagrad(lr_decay=0.1).init(params)) == {"sum", "step"}


@pytest.mark.parametrize(
    "name", ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"]
)
def test_values_out_of_range(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=rf"optim.adagrad: {name} must be at least 0.0, got -1"):
        ts.optim.adagrad(**options)
