"""``lion`` has the bits of two libraries, and the direction of its paper."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 1e-2, "betas": (0.95, 0.98), "weight_decay": 0.1},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch_optimi(options: dict[str, Any], dtype: torch.dtype) -> None:
    optimi = pytest.importorskip("optimi")
    settings = {"lr": 1e-4, "kahan_sum": False, "foreach": True, "triton": False, **options}
    assert_equal_bits(
        ts.optim.lion(**options),
        lambda p: optimi.Lion(p, **settings),
        params=make_params(dtype),
        rates=lambda step: 0.1 / (step + 1),
        missing=True,
        donate=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS, {"maximize": True}])
def test_bits_of_pytorch_optimizer(options: dict[str, Any], dtype: torch.dtype) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    assert_equal_bits(
        ts.optim.lion(**options),
        lambda p: library.Lion(p, **options),
        params=make_params(dtype),
        missing=True,
    )


def test_every_entry_moves_by_the_rate_against_the_interpolated_momentum() -> None:
    params = make_params(torch.float64)
    optimizer = ts.optim.lion(lr=0.5, betas=(0.9, 0.99))
    state = optimizer.init(params)
    momenta = {n: torch.zeros_like(p) for n, p in params.items()}
    for step in range(4):
        grads = make_grads(params, step)
        after, state = optimizer.apply(params, grads, state)
        for n, g in grads.items():
            sign = (0.9 * momenta[n] + 0.1 * g).sign()
            torch.testing.assert_close(after[n], params[n] - 0.5 * sign)
            momenta[n] = 0.99 * momenta[n] + 0.01 * g
        params = after


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_values_out_of_range(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=rf"optim.lion: {name} must be at least 0.0, got -1"):
        ts.optim.lion(**options)
    with pytest.raises(
        ValueError, match=r"optim.lion: betas\[1\] must be in \[0.0, 1.0\), got 1.0"
    ):
        ts.optim.lion(betas=(0.9, 1.0))
