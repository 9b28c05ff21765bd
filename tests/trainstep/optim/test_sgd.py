"""SGD has the bits of PyTorch's."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params
from support.snapshots import untouched

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.4},
    {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.2, "maximize": True},
    {"maximize": True},
]


def rates(step: int) -> float:
    return 0.2 * 0.9**step


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], foreach: bool) -> None:
    assert_equal_bits(
        ts.optim.sgd(**options), lambda p: torch.optim.SGD(p, **options, foreach=foreach)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch_with_a_schedule_missing_gradients_and_donation(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_equal_bits(
        ts.optim.sgd(**options),
        lambda p: torch.optim.SGD(p, **options, foreach=True),
        params=make_params(dtype),
        rates=rates,
        # Where one parameter has no momentum yet, PyTorch leaves the multi-tensor kernels for all; on
        # the CPU its single-tensor product of bfloat16 and a number is rounded otherwise.
        missing=dtype != torch.bfloat16,
        donate=True,
    )


def test_groups_with_different_options() -> None:
    def plain(n: str) -> bool:
        return "." not in n

    assert_equal_bits(
        ts.optim.partition(
            lambda n: "plain" if plain(n) else "rest",
            {"plain": ts.optim.sgd(), "rest": ts.optim.sgd(momentum=0.9, weight_decay=0.1)},
        ),
        torch.optim.SGD,
        groups=[
            {"of": plain},
            {"of": lambda n: not plain(n), "momentum": 0.9, "weight_decay": 0.1},
        ],
        rates=rates,
    )


def test_the_sign_of_zero_survives_the_first_step() -> None:
    params = {"w": torch.zeros(2)}
    grads = {"w": torch.tensor([0.0, -0.0])}
    optimizer = ts.optim.sgd(momentum=0.9)
    _, state = optimizer.apply(params, grads, optimizer.init(params))
    assert ts.equal(state["momentum_buffer"], grads)


def test_a_tensor_as_learning_rate() -> None:
    params, optimizer = make_params(), ts.optim.sgd()
    grads, state = make_grads(params, 0), optimizer.init(params)
    with untouched(params, grads):
        number, _ = optimizer.apply(params, grads, state, {"lr": 0.5})
        tensor, _ = optimizer.apply(params, grads, state, {"lr": torch.tensor(0.5)})
    assert ts.equal(number, tensor)


def test_what_is_kept_depends_on_the_options() -> None:
    params = make_params()
    assert ts.optim.sgd().init(params) == {}
    assert set(ts.optim.sgd(momentum=0.9).init(params)) == {"momentum_buffer"}
    assert set(ts.optim.sgd(momentum=0.9, dampening=0.5).init(params)) == {
        "momentum_buffer",
        "step",
    }


def test_defaults_are_those_of_torch() -> None:
    defaults = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert all(defaults[name] == value for name, value in ts.optim.sgd().hyper.items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -0.1}, r"sgd: lr must be at least 0\.0, got -0\.1"),
        ({"momentum": -1.0}, "sgd: momentum must be at least"),
        ({"weight_decay": -1.0}, "sgd: weight_decay must be at least"),
        ({"nesterov": True}, "nesterov needs momentum above 0 and dampening 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ts.optim.sgd(**options)


def test_unknown_hyperparameter() -> None:
    params, optimizer = make_params(), ts.optim.sgd()
    with pytest.raises(ValueError, match=r"sgd: unknown hyperparameter eps; known: lr, momentum"):
        optimizer.apply(params, {}, optimizer.init(params), {"eps": 0.1})
