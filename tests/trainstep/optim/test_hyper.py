"""Hyperparameters can be injected at every update, as numbers and as tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trainstep as ts
from support.optimizers import OPTIMIZERS, hyper_for
from support.reference import make_grads, make_params
from trainstep import optim

Make = Callable[[], ts.Optimizer]

INJECTED: dict[str, tuple[Make, dict[str, Any], Make]] = {
    "adamw": (
        optim.adamw,
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.3},
        lambda: optim.adamw(0.1, (0.5, 0.7), 0.1, 0.3),
    ),
    "sgd": (
        lambda: optim.sgd(momentum=0.9),
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.3},
        lambda: optim.sgd(0.1, 0.5, weight_decay=0.3),
    ),
    "rmsprop": (
        lambda: optim.rmsprop(momentum=0.9),
        {"lr": 0.1, "alpha": 0.5, "eps": 0.1, "weight_decay": 0.3, "momentum": 0.5},
        lambda: optim.rmsprop(0.1, 0.5, 0.1, 0.3, 0.5),
    ),
    "adagrad": (
        optim.adagrad,
        {"lr": 0.1, "weight_decay": 0.3, "eps": 0.1},
        lambda: optim.adagrad(0.1, weight_decay=0.3, eps=0.1),
    ),
    "nadam": (
        optim.nadam,
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "weight_decay": 0.3, "momentum_decay": 0.1},
        lambda: optim.nadam(0.1, (0.5, 0.7), weight_decay=0.3, momentum_decay=0.1),
    ),
    "radam": (
        optim.radam,
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.3},
        lambda: optim.radam(0.1, (0.5, 0.7), 0.1, 0.3),
    ),
    "adafactor": (
        optim.adafactor,
        {"lr": 0.1, "weight_decay": 0.3},
        lambda: optim.adafactor(0.1, weight_decay=0.3),
    ),
    "lion": (
        optim.lion,
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "weight_decay": 0.3},
        lambda: optim.lion(0.1, (0.5, 0.7), 0.3),
    ),
    "lamb": (
        optim.lamb,
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.3},
        lambda: optim.lamb(0.1, (0.5, 0.7), 0.1, 0.3),
    ),
    "schedule_free_adamw": (
        optim.schedule_free_adamw,
        {"lr": 0.1, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.3},
        lambda: optim.schedule_free_adamw(0.1, (0.9, 0.7), 0.1, 0.3),
    ),
}


def run(optimizer: ts.Optimizer, hyper: dict[str, Any] | None = None) -> Any:
    params = make_params()
    state = optimizer.init(params)
    for step in range(6):
        params, state = optimizer.apply(params, make_grads(params, step), state, hyper)
    return params, state


@pytest.mark.parametrize("name", INJECTED)
def test_injecting_is_building_with_the_values(name: str) -> None:
    make, hyper, built = INJECTED[name]
    assert ts.equal(run(make(), hyper), run(built()))
    assert not ts.equal(run(make()), run(built())), "the test could not fail"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_as_a_tensor_is_the_rate(name: str) -> None:
    # A tensor is multiplied in on the device, not passed as a number: other rounding, same update.
    optimizer = OPTIMIZERS[name]()
    if "lr" not in optimizer.accepts or name.startswith("from_torch"):
        pytest.skip("takes no rate, or not a tensor")
    number = run(optimizer, hyper_for(optimizer))[0]
    tensor = run(OPTIMIZERS[name](), {"lr": torch.tensor(1e-2, dtype=torch.float64)})[0]
    torch.testing.assert_close(tensor, number, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "lion", "sgd"])
def test_weight_decay_as_a_tensor(name: str) -> None:
    make, hyper, _ = INJECTED[name]
    tensors = {**hyper, "weight_decay": torch.tensor(0.3, dtype=torch.float64)}
    torch.testing.assert_close(run(make(), tensors)[0], run(make(), hyper)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unknown_name_is_an_error_that_lists_the_known(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), make_params()
    with pytest.raises(ValueError, match=r"unknown hyperparameter eta; known: "):
        optimizer.apply(params, make_grads(params, 0), optimizer.init(params), {"eta": 1.0})
