"""``lookahead`` has the bits of pytorch-optimizer's."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params
from trainstep import optim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"k": 3, "alpha": 0.8}, {"k": 1, "alpha": 0.25}])
def test_bits_of_pytorch_optimizer(options: dict[str, Any], dtype: torch.dtype) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    assert_equal_bits(
        optim.lookahead(optim.adamw(lr=0.1), **options),
        lambda p: library.Lookahead(torch.optim.AdamW(p, lr=0.1, fused=True), **options),
        params=make_params(dtype),
        donate=True,
    )


def test_counts_are_per_parameter() -> None:
    optimizer, rule = optim.lookahead(optim.sgd(lr=1.0), k=2, alpha=0.5), optim.sgd(lr=1.0)
    params = make_params(torch.float64)
    start, state = params, optimizer.init(params)
    for step in range(2):
        grads = make_grads(params, step)
        if step:
            del grads["scale"]
        params, state = optimizer.apply(params, grads, state)
    assert state["step"]["scale"] == 1
    once, _ = rule.apply(start, {"scale": make_grads(start, 0)["scale"]}, {})
    assert torch.equal(params["scale"], once["scale"])
    assert torch.equal(params["embed"], state["slow"]["embed"])


def test_alpha_one_is_the_inner_optimizer() -> None:
    optimizer, rule, params = (
        optim.lookahead(optim.adamw(), alpha=1.0),
        optim.adamw(),
        make_params(),
    )
    fast, state, other, kept = params, optimizer.init(params), params, rule.init(params)
    for step in range(7):
        grads = make_grads(params, step)
        fast, state = optimizer.apply(fast, grads, state, {"lr": 0.1})
        other, kept = rule.apply(other, grads, kept, {"lr": 0.1})
    assert ts.equal(fast, other)
    assert ts.equal(state["optimizer"], kept)


def test_values_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"optim.lookahead: k must be an int of at least 1, got 0"):
        optim.lookahead(optim.sgd(), k=0)
    with pytest.raises(ValueError, match=r"optim.lookahead: alpha must be in \[0, 1\], got 1.5"):
        optim.lookahead(optim.sgd(), alpha=1.5)
