"""``adafactor`` has the bits of ``torch.optim.Adafactor(foreach=True)``."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.reference import assert_equal_bits, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.5, "beta2_decay": -0.5, "weight_decay": 0.1},
    {"eps": (0.5, 0.1), "d": 2.0},
    {"maximize": True},
]


def start(dtype: torch.dtype) -> dict[str, Tensor]:
    kernel = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    return make_params(dtype) | {"kernel": kernel.to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equal_bits(
        ts.optim.adafactor(**options),
        lambda p: torch.optim.Adafactor(p, foreach=True, **options),
        params=start(dtype),
        rates=lambda step: 2.0 / (step + 1),
        missing=True,
        donate=True,
    )


def test_matrices_keep_a_row_and_a_column_others_a_full_moment() -> None:
    state = ts.optim.adafactor().init(start(torch.float32))
    shapes = {
        key: {n: tuple(t.shape) for n, t in state[key].items()} for key in ("row_var", "col_var")
    }
    assert shapes["row_var"]["kernel"] == (4, 2, 3, 1)
    assert shapes["col_var"]["kernel"] == (4, 2, 1, 3)
    assert shapes["row_var"]["a.weight"] == (5, 1)
    assert shapes["col_var"]["a.weight"] == (1, 3)
    assert set(state["variance"]) == {"a.bias", "scale"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be at least 0.0, got -1.0"),
        ({"beta2_decay": 0.1}, "beta2_decay must be at most 0, got 0.1"),
        ({"eps": (-1.0, 0.1)}, r"eps\[0\] must be at least 0.0, got -1.0"),
        ({"eps": (None, -1.0)}, r"eps\[1\] must be at least 0.0, got -1.0"),
        ({"d": 0.5}, "d must be at least 1.0, got 0.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0.0, got -1.0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"optim.adafactor: {text}"):
        ts.optim.adafactor(**options)
