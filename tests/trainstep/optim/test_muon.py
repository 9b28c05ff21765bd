"""``muon`` has the bits of ``torch.optim.Muon``, and says what to do with what is no matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params

OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False},
    {"momentum": 0.5, "weight_decay": 0.0, "adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "eps": 1e-3},
    {"ns_coefficients": (3.0, -3.2, 1.2)},
]


def matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: p for n, p in make_params(dtype).items() if p.ndim == 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not options.get("nesterov", True):
        pytest.skip("PyTorch overwrites its momentum here; see the next test")
    assert_equal_bits(
        ts.optim.muon(**options),
        lambda p: torch.optim.Muon(p, **options),
        params=matrices(dtype),
        rates=lambda step: 0.1 / (step + 1),
        missing=True,
        donate=True,
    )


def test_bfloat16_momentum_without_nesterov_is_a_running_mean() -> None:
    weight = make_params(torch.bfloat16)["a.weight"]
    optimizer = ts.optim.muon(nesterov=False, weight_decay=0.0)
    params: dict[str, Tensor] = {"w": weight}
    state, mean, expected = optimizer.init(params), torch.zeros_like(weight), weight.clone()
    for step in range(6):
        grads = make_grads(params, step)
        params, state = optimizer.apply(params, grads, state)
        mean.lerp_(grads["w"], 1 - 0.95)
        direction = _muon._zeropower_via_newtonschulz(
            mean.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7
        )
        expected.add_(direction, alpha=-1e-3 * (5 / 3) ** 0.5)
        assert torch.equal(state["momentum_buffer"]["w"], mean)
        assert torch.equal(params["w"], expected)


def test_what_is_no_matrix_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError) as caught:
        ts.optim.muon().init(make_params())
    assert str(caught.value) == (
        "optim.muon: expected matrices (2 axes), got a.bias (5,), scale (). Give them to another "
        'optimizer: optim.partition(optim.matrices(), {"matrix": optim.muon(), "rest": '
        "optim.adamw()})"
    )
    many = {f"b{i}": torch.zeros(2) for i in range(8)}
    with pytest.raises(ValueError, match=r"b4 \(2,\) and 3 more\. Give"):
        ts.optim.muon().init(many)


def test_matrices_gives_muon_the_hidden_layers_and_adamw_the_rest() -> None:
    params = make_params()
    rules = {"matrix": ts.optim.muon(), "rest": ts.optim.adamw()}
    optimizer = ts.optim.partition(ts.optim.matrices(), rules)
    state = optimizer.init(params)
    assert set(state["matrix"]["momentum_buffer"]) == {"a.weight", "b.weight"}
    assert set(state["rest"]["exp_avg"]) == {"embed", "a.bias", "scale"}
    after, _ = optimizer.apply(params, make_grads(params, 0), state)
    assert {d.path for d in ts.diff(after, params)} == set(params)
    label_of = ts.optim.matrices(exclude="")
    assert label_of("embed", params["embed"]) == "matrix"
    assert label_of("lm_head.bias", params["a.bias"]) == "rest"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be at least 0.0, got -1.0"),
        ({"momentum": -1.0}, "momentum must be at least 0.0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0.0, got -1.0"),
        ({"ns_steps": 100}, r"ns_steps must be in \[0, 100\), got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients must be three numbers: \(1.0, 2.0\)"),
        (
            {"adjust_lr_fn": "rms"},
            'adjust_lr_fn must be None, "original" or "match_rms_adamw", got \'rms\'',
        ),
    ],
)
def test_values_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"optim.muon: {text}"):
        ts.optim.muon(**options)
