"""``lamb`` follows its paper, and a library within a few units in the last place."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.reference import make_grads, make_params

STEPS = 12


def paper(
    param: Tensor, grads: list[Tensor], lr: float, eps: float, decay: float, corrected: bool
) -> Tensor:
    """Algorithm 2 of arXiv:1904.00962 for one tensor, as it stands there."""
    m = v = torch.zeros_like(param)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        scale = (1 - 0.9**t, 1 - 0.999**t) if corrected else (1, 1)
        direction = m / scale[0] / ((v / scale[1]).sqrt() + eps) + decay * param
        weight, length = param.norm(), direction.norm()
        ratio = weight / length if weight and length else 1.0
        param = param - lr * ratio * direction
    return param


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_algorithm_of_the_paper(decay: float, corrected: bool) -> None:
    start = make_params(torch.float64)
    optimizer = ts.optim.lamb(0.1, weight_decay=decay, bias_correction=corrected)
    params, state = start, optimizer.init(start)
    grads = [make_grads(start, step) for step in range(STEPS)]
    for g in grads:
        params, state = optimizer.apply(params, g, state)
    for n, p in params.items():
        expected = paper(start[n], [g[n] for g in grads], 0.1, 1e-6, decay, corrected)
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.8, 0.9)}])
def test_within_eight_ulps_of_pytorch_optimizer(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    start = make_params(dtype)
    # Version 3 of the paper; eps is 0 since the library adds it to the norm as well.
    ours = ts.optim.lamb(eps=0.0, bias_correction=False, max_weight_norm=10.0, **options)
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    theirs = library.Lamb(
        list(leaves.values()),
        eps=0.0,
        weight_decouple=False,
        adam_debias=True,
        foreach=False,
        **options,
    )
    params, state = start, ours.init(start)
    for step in range(STEPS):
        grads = make_grads(start, step)
        grads["a.bias"] = grads["a.bias"] + 1.0  # zero gradients over eps=0 are not numbers
        for n, leaf in leaves.items():
            leaf.grad = grads[n].clone()
        theirs.step()
        params, state = ours.apply(params, grads, state)
    found = ts.diff(params, {n: leaf.detach() for n, leaf in leaves.items()})
    assert max((d.max_ulp or 0 for d in found), default=0) <= 8, found


def test_zero_parameters_move_with_ratio_one_and_zero_directions_not_at_all() -> None:
    params = {"zero": torch.zeros(3, dtype=torch.float64), "still": torch.ones(2).double()}
    grads = {"zero": torch.full((3,), 2.0).double(), "still": torch.zeros(2).double()}
    optimizer = ts.optim.lamb(lr=0.5, eps=0.1)
    after, _ = optimizer.apply(params, grads, optimizer.init(params))
    torch.testing.assert_close(after["zero"], torch.full((3,), -0.5 * 2 / 2.1).double())
    assert torch.equal(after["still"], params["still"])


def test_max_weight_norm_bounds_the_step() -> None:
    params, grads = {"w": torch.full((4,), 50.0)}, {"w": torch.ones(4)}
    for bound, length in ((10.0, 10.0), (math.inf, 100.0)):
        optimizer = ts.optim.lamb(lr=0.1, max_weight_norm=bound)
        after, _ = optimizer.apply(params, grads, optimizer.init(params))
        torch.testing.assert_close((after["w"] - params["w"]).norm(), torch.tensor(0.1 * length))


def test_maximize_is_descent_on_negated_gradients() -> None:
    params = make_params()
    grads = make_grads(params, 0)
    up, down = ts.optim.lamb(maximize=True), ts.optim.lamb()
    after = up.apply(params, grads, up.init(params))
    negated = {n: -g for n, g in grads.items()}
    assert ts.equal(after, down.apply(params, negated, down.init(params)))


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "max_weight_norm"])
def test_values_out_of_range(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=rf"optim.lamb: {name} must be at least 0.0, got -1"):
        ts.optim.lamb(**options)
