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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "lamb", "schedule_free_adamw"])
def test_a_schedule_is_no_rate(name: str) -> None:
    make = getattr(ts.optim, name)
    text = rf"optim\.{name}: lr must be a number, got a function\. .*make_step\(\.\.\., schedule="
    with pytest.raises(TypeError, match=text):
        make(ts.schedules.constant(0.1))


@pytest.mark.parametrize(
    ("other", "mine", "text"),
    [
        (ts.optim.sgd(), ts.optim.adamw(), "opt_state lacks step, exp_avg, exp_avg_sq"),
        (
            ts.optim.from_torch(torch.optim.Adam),
            ts.optim.adamw(),
            "has unexpected live, state, groups",
        ),
        (ts.optim.adamw(), ts.optim.from_torch(torch.optim.Adam), "lacks live, state, groups"),
        (
            ts.optim.partition(lambda n: "a", {"a": ts.optim.sgd(momentum=0.9)}),
            ts.optim.partition(lambda n: "a", {"a": ts.optim.adamw()}),
            "opt_state/a lacks step",
        ),
        (ts.optim.ema(ts.optim.adamw()), ts.optim.adamw(), "has unexpected ema, optimizer"),
    ],
)
def test_the_state_of_another_optimizer_is_explained(
    other: ts.Optimizer, mine: ts.Optimizer, text: str
) -> None:
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=f"made for another optimizer or .*{text}"):
        mine.apply(params, {"w": torch.ones(2)}, other.init(params))


def test_an_error_of_the_optimizer_itself_stays() -> None:
    def kernel(params: Any, grads: Any, state: Any, hyper: Any) -> None:
        raise KeyError("mine")

    broken = ts.Optimizer("broken", lambda params: {"m": params}, kernel)
    params = {"w": torch.ones(2)}
    with pytest.raises(KeyError, match="mine"):
        broken.apply(params, params, {"m": params})
