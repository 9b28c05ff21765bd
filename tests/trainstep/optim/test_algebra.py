"""``partition``: each group of parameters has its own rule."""

import pytest
import torch

import trainstep as ts
from support.reference import assert_equal_bits, make_grads, make_params
from support.snapshots import untouched

RULES = {"fast": ts.optim.sgd(lr=1.0), "slow": ts.optim.adamw(lr=1e-3, weight_decay=0.3)}


def by_first(name: str) -> str:
    return "fast" if name.startswith("a.") else "slow"


@pytest.mark.parametrize("labels", [by_first, {r"^a\.": "fast", ".*": "slow"}])
def test_each_group_has_the_bits_of_its_own_optimizer(labels) -> None:  # type: ignore[no-untyped-def]
    params, optimizer = make_params(), ts.optim.partition(labels, RULES)
    state = optimizer.init(params)
    alone = {label: {n: p for n, p in params.items() if by_first(n) == label} for label in RULES}
    kept = {label: RULES[label].init(alone[label]) for label in RULES}
    for step in range(5):
        grads = make_grads(params, step)
        with untouched(params, grads, state):
            after, new = optimizer.apply(params, grads, state)
        params, state = after, new
        for label, rule in RULES.items():
            mine = {n: g for n, g in grads.items() if by_first(n) == label}
            alone[label], kept[label] = rule.apply(alone[label], mine, kept[label])
    assert ts.equal(params, {**alone["fast"], **alone["slow"]})
    assert ts.equal(state, kept)


def test_hyperparameters_reach_every_group_that_has_them() -> None:
    params, optimizer = make_params(), ts.optim.partition(by_first, RULES)
    grads, state = make_grads(params, 0), optimizer.init(params)
    after, _ = optimizer.apply(params, grads, state, {"lr": 0.0})
    assert ts.equal(after, params)
    after, _ = optimizer.apply(params, grads, state, {"beta1": 0.5})
    other, _ = optimizer.apply(params, grads, state)
    assert torch.equal(after["a.bias"], other["a.bias"]), "sgd has no beta1"


def test_the_first_pattern_that_matches_wins() -> None:
    optimizer = ts.optim.partition({"bias": "fast", r"a\.": "slow", "": "fast"}, RULES)
    state = optimizer.init(make_params())
    assert set(state["slow"]["exp_avg"]) == {"a.weight"}


def test_a_group_may_be_empty_or_without_gradients() -> None:
    for rule in (ts.optim.adamw(), ts.optim.from_torch(torch.optim.Adam)):
        optimizer = ts.optim.partition(lambda n: "all", {"all": rule, "none": rule})
        assert_equal_bits(
            optimizer,
            lambda p, r=rule: (
                torch.optim.Adam(p) if "torch" in r.name else torch.optim.AdamW(p, fused=True)
            ),
        )
    optimizer, params = ts.optim.partition(by_first, RULES), make_params()
    state = optimizer.init(params)
    after, new = optimizer.apply(params, {"a.bias": torch.ones(5)}, state)
    assert ts.equal(new["slow"], state["slow"])
    assert ts.diff(after, params)[0].path == "a.bias"


def test_groups_may_hold_groups_and_wrapped_classes() -> None:
    inner = ts.optim.partition(
        {"bias": "b", ".*": "w"},
        {"b": ts.optim.sgd(lr=0.1), "w": ts.optim.from_torch(torch.optim.Adagrad)},
    )
    optimizer = ts.optim.partition(by_first, {"fast": inner, "slow": ts.optim.adam()})
    params = make_params()
    state = optimizer.init(params)
    after, new = optimizer.apply(params, make_grads(params, 0), state, {"lr": 0.05})
    assert {d.path for d in ts.diff(after, params)} == set(params)
    assert ts.serialize.to_flat(ts.TrainState(0, after, {}, new, ts.rng.key(0)))[0]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            lambda n: "medium",
            r"parameter embed has label 'medium', which has no optimizer; labels: 'fast', 'slow'",
        ),
        (
            {r"^a\.": "fast"},
            r"no pattern matches parameter embed; patterns: \^a\\\.\. Add a last one",
        ),
        ({".*": "medium"}, r"has label 'medium', which has no optimizer"),
    ],
)
def test_unknown_labels_and_unmatched_names_are_explained(labels, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        ts.optim.partition(labels, RULES).init(make_params())


def test_unknown_hyperparameter() -> None:
    params, optimizer = make_params(), ts.optim.partition(by_first, RULES)
    with pytest.raises(ValueError, match="partition: unknown hyperparameter eta; known: beta1"):
        optimizer.apply(params, make_grads(params, 0), optimizer.init(params), {"eta": 1.0})
