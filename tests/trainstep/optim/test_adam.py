"""Adam and AdamW have the bits of PyTorch's, fused and multi-tensor."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params
from support.snapshots import untouched

MAKERS = {"adam": (ts.optim.adam, torch.optim.Adam), "adamw": (ts.optim.adamw, torch.optim.AdamW)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.05},
    {"maximize": True, "lr": 0.01},
    {"weight_decay": 0.0},
]


def rates(step: int) -> float:
    return 0.1 / (step + 1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_bits_of_torch(name: str, options: dict[str, Any], fused: bool) -> None:
    ours, theirs = MAKERS[name]
    kind = {"fused": True} if fused else {"foreach": True}
    assert_equal_bits(ours(**options, fused=fused), lambda p: theirs(p, **options, **kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_bits_of_torch_with_a_schedule_missing_gradients_and_donation(
    name: str, fused: bool, dtype: torch.dtype
) -> None:
    ours, theirs = MAKERS[name]
    kind = {"fused": True} if fused else {"foreach": True}
    state = assert_equal_bits(
        ours(fused=fused),
        lambda p: theirs(p, **kind),
        params=make_params(dtype),
        rates=rates,
        missing=True,
        donate=True,
    )
    assert state["step"]["scale"] == 0, "never had a gradient"
    assert state["exp_avg"]["embed"].dtype == dtype


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_groups_with_different_weight_decay(name: str, fused: bool) -> None:
    ours, theirs = MAKERS[name]

    def plain(n: str) -> bool:
        return n.endswith("bias") or n == "scale"

    assert_equal_bits(
        ts.optim.partition(
            lambda n: "plain" if plain(n) else "decayed",
            {
                "plain": ours(weight_decay=0.0, fused=fused),
                "decayed": ours(weight_decay=0.2, fused=fused),
            },
        ),
        lambda groups: theirs(groups, **({"fused": True} if fused else {"foreach": True})),
        groups=[
            {"of": plain, "weight_decay": 0.0},
            {"of": lambda n: not plain(n), "weight_decay": 0.2},
        ],
        rates=rates,
        missing=True,
    )


def test_parameters_of_two_dtypes() -> None:
    params = make_params()
    params["a.weight"] = params["a.weight"].double()
    for fused in (True, False):
        kind = {"fused": True} if fused else {"foreach": True}
        assert_equal_bits(
            ts.optim.adamw(fused=fused), lambda p, k=kind: torch.optim.AdamW(p, **k), params=params
        )


def test_hyperparameters_may_be_tensors() -> None:
    params, optimizer = make_params(), ts.optim.adamw()
    grads, state = make_grads(params, 0), optimizer.init(params)
    number, _ = optimizer.apply(params, grads, state, {"lr": 0.5})
    tensor, _ = optimizer.apply(params, grads, state, {"lr": torch.tensor(0.5)})
    assert ts.equal(number, tensor)


def test_defaults_are_those_of_torch() -> None:
    leaf = [torch.nn.Parameter(torch.zeros(1))]
    for ours, theirs in MAKERS.values():
        defaults = theirs(leaf).defaults
        assert ours().hyper == {
            "lr": defaults["lr"],
            "beta1": defaults["betas"][0],
            "beta2": defaults["betas"][1],
            "eps": defaults["eps"],
            "weight_decay": defaults["weight_decay"],
        }


@pytest.mark.parametrize("fused", [True, False])
def test_state_is_complete_from_the_start_and_apply_is_pure(fused: bool) -> None:
    params, optimizer = make_params(), ts.optim.adamw(amsgrad=True, fused=fused)
    grads, state = make_grads(params, 0), optimizer.init(params)
    with untouched(params, grads, state):
        _, after = optimizer.apply(params, grads, state)
    assert set(after) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    paths = [[path for path, _ in ts.tree.leaves_with_paths(s)] for s in (state, after)]
    assert paths[0] == paths[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, r"adamw: lr must be at least 0\.0, got -1\.0"),
        ({"betas": (1.0, 0.9)}, r"adamw: betas\[0\] must be in \[0\.0, 1\.0\), got 1\.0"),
        ({"betas": (0.9, -0.1)}, r"adamw: betas\[1\] must be in"),
        ({"eps": -1e-9}, r"adamw: eps must be at least"),
        ({"weight_decay": float("nan")}, r"adamw: weight_decay must be at least 0\.0, got nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ts.optim.adamw(**options)


def test_unknown_hyperparameters_and_gradients_list_the_known_ones() -> None:
    params, optimizer = make_params(), ts.optim.adamw()
    grads, state = make_grads(params, 0), optimizer.init(params)
    with pytest.raises(ValueError, match=r"adamw: unknown hyperparameter momentum; known: beta1, "):
        optimizer.apply(params, grads, state, {"momentum": 0.9})
    with pytest.raises(
        ValueError, match=r"adamw: unknown gradient head; known: a\.bias, a\.weight"
    ):
        optimizer.apply(params, {"head": grads["embed"]}, state)
