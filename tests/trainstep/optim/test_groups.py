"""Groups with learning rates and weight decays of their own, masks and frozen parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.optimizers import OPTIMIZERS, by_axes
from support.reference import assert_equal_bits, make_grads, make_params
from support.snapshots import untouched
from trainstep import optim

DECAYS = {"matrix": optim.adamw(weight_decay=0.3), "rest": optim.adamw(weight_decay=0.0)}


def test_weight_decay_per_group_has_the_bits_of_torchs_groups() -> None:
    groups: list[dict[str, Any]] = [
        {"of": lambda n: "weight" in n or n == "embed", "weight_decay": 0.3},
        {"of": lambda n: n in ("a.bias", "scale"), "weight_decay": 0.0},
    ]
    assert_equal_bits(
        optim.partition(by_axes, DECAYS),
        lambda p: torch.optim.AdamW(p, fused=True),
        groups=groups,
        rates=lambda step: 0.1 / (step + 1),
    )


def test_rates_per_group_follow_a_shared_schedule() -> None:
    groups: list[dict[str, Any]] = [
        {"of": lambda n: "weight" in n or n == "embed"},
        {"of": lambda n: n in ("a.bias", "scale")},
    ]

    def in_proportion(params: list[Any]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, fused=True)
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: optimizer.param_groups[1].update(
                lr=optimizer.param_groups[1]["lr"] * 0.25
            )
        )
        return optimizer

    rules = {"matrix": optim.adamw(), "rest": optim.scaled(optim.adamw(), 0.25)}
    assert_equal_bits(
        optim.partition(by_axes, rules),
        in_proportion,
        groups=groups,
        rates=lambda step: 0.1 / (step + 1),
    )


def test_a_hyperparameter_for_one_group_wins_over_that_for_all() -> None:
    params, optimizer = make_params(), optim.partition(by_axes, DECAYS)
    grads, state = make_grads(params, 0), optimizer.init(params)
    after, _ = optimizer.apply(params, grads, state, {"lr": 0.1, "rest/lr": 0.0})
    changed = {d.path for d in ts.diff(after, params)}
    assert changed == {"embed", "a.weight", "b.weight"}
    nested = optim.partition(lambda n: "all", {"all": optimizer})
    inner = nested.apply(params, grads, nested.init(params), {"lr": 0.1, "all/rest/lr": 0.0})[0]
    assert ts.equal(inner, after)
    with pytest.raises(ValueError, match="unknown hyperparameter other/lr; known: "):
        optimizer.apply(params, grads, state, {"other/lr": 0.0})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_is_the_optimizer_on_the_selected_alone(name: str) -> None:
    params = make_params()
    chosen = {n: p for n, p in params.items() if n.startswith("a.")}
    alone, optimizer = OPTIMIZERS[name](), optim.masked(OPTIMIZERS[name](), r"^a\.")
    state, kept = optimizer.init(params), alone.init(chosen)
    for step in range(4):
        grads = make_grads(params, step)
        with untouched(params, grads, state):
            after, new = optimizer.apply(params, grads, state)
        mine = {n: grads[n] for n in chosen}
        chosen, kept = alone.apply(chosen, mine, kept)
        assert ts.equal(after, {**params, **chosen})
        params, state = after, new
    assert ts.equal(state, kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_that_selects_nothing_freezes_everything(name: str) -> None:
    params, optimizer = make_params(), optim.masked(OPTIMIZERS[name](), lambda name: False)
    state = optimizer.init(params)
    assert ts.tree.leaves(state) == []
    assert ts.equal(optimizer.apply(params, make_grads(params, 0), state), (params, state))


def test_frozen_parameters_ignore_even_gradients_that_are_not_numbers() -> None:
    params = make_params()
    optimizer = optim.partition(by_axes, {"matrix": optim.adamw(), "rest": optim.freeze()})
    grads = make_grads(params, 0)
    grads["scale"] = torch.full_like(params["scale"], torch.nan)
    after, state = optimizer.apply(params, grads, optimizer.init(params), {"lr": 0.1})
    assert {d.path for d in ts.diff(after, params)} == {"embed", "a.weight", "b.weight"}
    assert state["rest"] == {}
    alone = optim.freeze()
    assert ts.equal(alone.apply(params, grads, {}, {"lr": 0.1})[0], params)


def test_labels_may_depend_on_shapes_and_one_optimizer_serves_several_models() -> None:
    optimizer = optim.partition(by_axes, {"matrix": optim.lion(), "rest": optim.freeze()})
    first: dict[str, Tensor] = {"w": torch.ones(2, 2)}
    second: dict[str, Tensor] = {"w": torch.ones(2)}
    assert set(optimizer.init(first)["matrix"]["exp_avg"]) == {"w"}
    assert optimizer.init(second)["matrix"] == {}


def test_misspelt_names_are_refused_at_init() -> None:
    params = make_params()
    with pytest.raises(
        ValueError, match=r"masked: no parameter matches 'a\.wieght'; parameters: e"
    ):
        optim.masked(optim.adamw(), ["a.wieght"]).init(params)
    with pytest.raises(ValueError, match=r"partition: no parameter matches 'a\.wieght'"):
        optim.partition({"a.wieght": "matrix", ".*": "rest"}, DECAYS).init(params)
