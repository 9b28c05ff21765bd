"""Schedule-free optimizers have the bits of the package schedulefree, averages included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "warmup_steps": 5},
    {"r": 1.0, "weight_lr_power": 0.0},
]


def in_training(cls: Callable[..., Any], **options: Any) -> Callable[[list[Any]], Any]:
    def make(params: list[Any]) -> Any:
        optimizer = cls(params, **options)
        optimizer.train()
        return optimizer

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_adamw_has_the_bits_of_the_package(options: dict[str, Any], dtype: torch.dtype) -> None:
    package = pytest.importorskip("schedulefree")
    assert_equal_bits(
        ts.optim.schedule_free_adamw(**options),
        in_training(package.AdamWScheduleFree, **options),
        params=make_params(dtype),
        rates=lambda step: 0.01 / (step + 1),
        donate=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS, {"momentum": 0.5}])
def test_sgd_has_the_bits_of_the_package(options: dict[str, Any], dtype: torch.dtype) -> None:
    package = pytest.importorskip("schedulefree")
    assert_equal_bits(
        ts.optim.schedule_free_sgd(**{"lr": 0.1, **options}),
        in_training(package.SGDScheduleFree, **{"lr": 0.1, **options}),
        params=make_params(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_has_the_bits_of_the_package(dtype: torch.dtype) -> None:
    package = pytest.importorskip("schedulefree")
    start = make_params(dtype)
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    theirs = in_training(package.AdamWScheduleFree)(list(leaves.values()))
    ours = ts.optim.schedule_free_adamw()
    params, state = start, ours.init(start)
    for step in range(7):
        grads = make_grads(start, step)
        for n, leaf in leaves.items():
            leaf.grad = grads[n].clone()
        theirs.step()
        params, state = ours.apply(params, grads, state)
    theirs.eval()
    averages = ts.optim.schedule_free_params(state, params)
    assert ts.equal(averages, {n: leaf.detach() for n, leaf in leaves.items()})


def test_the_average_is_the_mean_of_the_iterates() -> None:
    # With a constant rate and r = 0 every z weighs the same: x is their arithmetic mean.
    params: dict[str, Tensor] = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    optimizer = ts.optim.schedule_free_sgd(lr=0.1, momentum=0.9)
    state, iterates = optimizer.init(params), []
    for _ in range(20):
        params, state = optimizer.apply(params, {"w": params["w"].clone()}, state)
        iterates.append(state["schedule_free"]["z"]["w"])
        average = ts.optim.schedule_free_params(state, params)["w"]
        torch.testing.assert_close(average, torch.stack(iterates).mean(dim=0))
    torch.testing.assert_close(params["w"], 0.9 * average + 0.1 * iterates[-1])


def test_counts_are_per_parameter() -> None:
    params = make_params()
    optimizer = ts.optim.schedule_free_adamw(warmup_steps=4)
    state = optimizer.init(params)
    alone = {"a.bias": params["a.bias"]}
    kept = optimizer.init(alone)
    for step in range(5):
        grads = make_grads(params, step)
        if step == 2:
            del grads["a.bias"]
        else:
            alone, kept = optimizer.apply(alone, {"a.bias": grads["a.bias"]}, kept)
        params, state = optimizer.apply(params, grads, state)
    assert torch.equal(params["a.bias"], alone["a.bias"])
    assert state["schedule_free"]["step"]["a.bias"] == 4
    assert state["schedule_free"]["step"]["scale"] == 5


def test_params_come_from_a_train_state_and_from_inside_a_partition() -> None:
    params = make_params()
    rules = {"free": ts.optim.schedule_free_sgd(lr=0.1), "rest": ts.optim.adamw()}
    optimizer = ts.optim.partition({"weight": "free", ".*": "rest"}, rules)
    state = ts.init(params, optimizer)
    for step in range(3):
        new, kept = optimizer.apply(state.params, make_grads(params, step), state.opt_state)
        state = state.evolve(params=new, opt_state=kept)
    averages = ts.optim.schedule_free_params(state)
    assert set(averages) == set(params)
    assert {d.path for d in ts.diff(averages, state.params)} == {"a.weight", "b.weight"}


def test_what_schedule_free_params_needs() -> None:
    params = make_params()
    optimizer = ts.optim.schedule_free_sgd()
    with pytest.raises(
        ValueError, match=r"needs its parameters: schedule_free_params\(opt_state, p"
    ):
        ts.optim.schedule_free_params(optimizer.init(params))
    with pytest.raises(ValueError, match="the state has no schedule-free average"):
        ts.optim.schedule_free_params(ts.init(params, ts.optim.adamw()))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ts.optim.schedule_free_adamw(lr=-1.0), "adamw: lr must be at least 0.0"),
        (lambda: ts.optim.schedule_free_adamw(betas=(0.0, 0.9)), r"must be in \(0, 1\), got 0.0"),
        (lambda: ts.optim.schedule_free_adamw(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0.0, 1"),
        (lambda: ts.optim.schedule_free_sgd(momentum=1.0), r"sgd: momentum \(betas\[0\]\) must be"),
        (lambda: ts.optim.schedule_free_sgd(warmup_steps=-1), "warmup_steps must be at least 0"),
    ],
)
def test_values_out_of_range(make: Callable[[], ts.Optimizer], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
