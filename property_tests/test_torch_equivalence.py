"""Drawn hyperparameters, groups, schedules and missing gradients: the bits of ``torch.optim``."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import trainstep as ts
from support.reference import SHAPES, assert_equal_bits, make_params

RATES = st.floats(1e-5, 0.5)
DECAYS = st.sampled_from([0.0, 1e-3, 0.1, 0.7])
BETAS = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.999))
DTYPES = st.sampled_from([torch.float32, torch.float64])
LABELS = st.fixed_dictionaries({name: st.sampled_from("ab") for name in SHAPES})


def groups_of(labels: dict[str, str], options: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"of": lambda name, label=label: labels[name] == label, **options[label]}
        for label in options
        if label in labels.values()
    ]


@given(
    lr=RATES,
    betas=BETAS,
    decays=st.fixed_dictionaries({"a": DECAYS, "b": DECAYS}),
    labels=LABELS,
    dtype=DTYPES,
    fused=st.booleans(),
    decoupled=st.booleans(),
    missing=st.booleans(),
    flags=st.fixed_dictionaries({"amsgrad": st.booleans(), "maximize": st.booleans()}),
)
def test_adam_and_adamw(
    lr: float,
    betas: tuple[float, float],
    decays: dict[str, float],
    labels: dict[str, str],
    dtype: torch.dtype,
    fused: bool,
    decoupled: bool,
    missing: bool,
    flags: dict[str, bool],
) -> None:
    ours = ts.optim.adamw if decoupled else ts.optim.adam
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    kind = {"fused": True} if fused else {"foreach": True}
    rules = {
        label: ours(lr, betas, weight_decay=decay, fused=fused, **flags)
        for label, decay in decays.items()
    }
    assert_equal_bits(
        ts.optim.partition(labels.__getitem__, rules),
        lambda params: theirs(params, lr, betas, **kind, **flags),
        params=make_params(dtype),
        groups=groups_of(labels, {k: {"weight_decay": decay} for k, decay in decays.items()}),
        rates=lambda step: lr / (step + 1),
        steps=5,
        missing=missing,
    )


SGD = st.one_of(
    st.fixed_dictionaries({"momentum": st.sampled_from([0.0, 0.5, 0.9]), "weight_decay": DECAYS}),
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.99), "dampening": st.floats(0.0, 0.9)}),
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.99), "nesterov": st.just(True)}),
)


@given(
    lr=RATES,
    options=st.fixed_dictionaries({"a": SGD, "b": SGD}),
    labels=LABELS,
    dtype=DTYPES,
    maximize=st.booleans(),
    missing=st.booleans(),
    foreach=st.booleans(),
)
def test_sgd(
    lr: float,
    options: dict[str, dict[str, Any]],
    labels: dict[str, str],
    dtype: torch.dtype,
    maximize: bool,
    missing: bool,
    foreach: bool,
) -> None:
    rules = {
        label: ts.optim.sgd(lr, **chosen, maximize=maximize) for label, chosen in options.items()
    }
    assert_equal_bits(
        ts.optim.partition(labels.__getitem__, rules),
        lambda params: torch.optim.SGD(params, lr, maximize=maximize, foreach=foreach),
        params=make_params(dtype),
        groups=groups_of(labels, options),
        rates=lambda step: lr * 0.9**step,
        steps=5,
        missing=missing,
    )


CLASSES = [
    torch.optim.SGD,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
]


@given(cls=st.sampled_from(CLASSES), lr=RATES, decay=DECAYS, dtype=DTYPES, missing=st.booleans())
def test_wrapped_classes(
    cls: Any, lr: float, decay: float, dtype: torch.dtype, missing: bool
) -> None:
    assert_equal_bits(
        ts.optim.from_torch(cls, lr=lr, weight_decay=decay),
        lambda params: cls(params, lr=lr, weight_decay=decay),
        params=make_params(dtype),
        steps=5,
        missing=missing,
    )
