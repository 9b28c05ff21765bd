"""Rates of their own: scaled, scheduled, decaying by layer."""

import pytest
import torch

import trainstep as ts
from support.reference import make_grads, make_params
from trainstep import optim, schedules


def test_scaled_multiplies_default_and_injected_rates() -> None:
    params, rule = make_params(), optim.adamw(lr=0.5)
    grads, optimizer = make_grads(params, 0), optim.scaled(rule, 0.25)
    state = optimizer.init(params)
    assert ts.equal(
        optimizer.apply(params, grads, state), rule.apply(params, grads, state, {"lr": 0.125})
    )
    assert ts.equal(
        optimizer.apply(params, grads, state, {"lr": 0.2}),
        rule.apply(params, grads, state, {"lr": 0.2 * 0.25}),
    )
    decays = optim.scaled(rule, 2.0, name="weight_decay")
    assert ts.equal(
        decays.apply(params, grads, state),
        rule.apply(params, grads, state, {"weight_decay": 0.02}),
    )


def test_scaled_factors_multiply() -> None:
    params, rule = make_params(), optim.sgd(lr=1.0)
    grads, twice = make_grads(params, 0), optim.scaled(optim.scaled(rule, 0.5), 0.5)
    assert ts.equal(twice.apply(params, grads, {}), rule.apply(params, grads, {}, {"lr": 0.25}))


def test_scheduled_counts_its_own_updates() -> None:
    schedule, rule = schedules.linear(1.0, 10, 2), optim.sgd()
    optimizer = optim.scheduled(rule, schedule)
    params = expected = make_params()
    state = optimizer.init(params)
    done = 0
    for step in range(6):
        grads = {} if step in (1, 4) else make_grads(params, step)
        params, state = optimizer.apply(params, grads, state)
        if grads:
            expected, _ = rule.apply(expected, grads, {}, {"lr": schedule(done)})
            done += 1
        assert ts.equal(params, expected)
        assert state["step"] == done


def test_a_group_with_its_own_schedule_ignores_the_steps_schedule() -> None:
    rules = {
        "a": optim.scheduled(optim.sgd(), lambda step: 0.5),
        "b": optim.sgd(),
    }
    optimizer = optim.partition({r"^a\.": "a", "": "b"}, rules)
    params = make_params()
    grads = make_grads(params, 0)
    after, _ = optimizer.apply(params, grads, optimizer.init(params), {"lr": 0.125})
    for n, p in params.items():
        assert torch.equal(after[n], p.add(grads[n], alpha=-0.5 if n.startswith("a.") else -0.125))
    assert "lr" not in rules["a"].hyper
    with pytest.raises(
        ValueError, match=r"scheduled\(sgd\): unknown hyperparameter lr; known: mom"
    ):
        rules["a"].apply(params, grads, rules["a"].init(params), {"lr": 0.1})


def test_scheduled_weight_decay() -> None:
    rule = optim.adamw()
    optimizer = optim.scheduled(rule, schedules.constant(0.5), name="weight_decay")
    params = make_params()
    grads = make_grads(params, 0)
    after, _ = optimizer.apply(params, grads, optimizer.init(params), {"lr": 0.1})
    same, _ = rule.apply(params, grads, rule.init(params), {"lr": 0.1, "weight_decay": 0.5})
    assert ts.equal(after, same)


def test_layerwise_decay_lowers_rates_towards_the_input() -> None:
    names = ["embed.w", "blocks.0.w", "blocks.1.w", "norm.w", "head.w"]
    params = {n: torch.zeros(3, dtype=torch.float64) for n in names}
    grads = {n: torch.ones(3, dtype=torch.float64) for n in names}
    optimizer = optim.layerwise_decay(optim.sgd(), 0.5, optim.depth_from_top(2))
    state = optimizer.init(params)
    assert list(state) == ["0", "1", "2", "3"]
    after, _ = optimizer.apply(params, grads, state, {"lr": 1.0})
    rates = {n: -after[n][0].item() for n in names}
    assert rates == {
        "embed.w": 0.125,
        "blocks.0.w": 0.25,
        "blocks.1.w": 0.5,
        "norm.w": 1.0,
        "head.w": 1.0,
    }


def test_layerwise_decay_of_one_is_the_optimizer() -> None:
    params, rule = make_params(), optim.adamw()
    optimizer = optim.layerwise_decay(rule, 1.0, len)
    state, kept = optimizer.init(params), rule.init(params)
    other = params
    for step in range(4):
        grads = make_grads(params, step, missing=True)
        params, state = optimizer.apply(params, grads, state)
        other, kept = rule.apply(other, grads, kept)
    assert ts.equal(params, other)


def test_depth_from_top_reads_numbers_and_patterns() -> None:
    depth_of = optim.depth_from_top(12, block=r"layer\.(\d+)", first="embeddings")
    assert depth_of("bert.encoder.layer.11.attention.weight") == 1
    assert depth_of("bert.encoder.layer.0.attention.weight") == 12
    assert depth_of("bert.embeddings.word.weight") == 13
    assert depth_of("classifier.weight") == 0


def test_what_has_no_rate_of_its_own_is_explained() -> None:
    whole = optim.partition(lambda n: "a", {"a": optim.adamw()})
    text = r"scaled: partition has no hyperparameter 'lr' of its own; it has: none. Apply scaled to"
    with pytest.raises(ValueError, match=text):
        optim.scaled(whole, 0.5)
    with pytest.raises(ValueError, match="layerwise_decay: partition has no hyperparameter 'lr'"):
        optim.layerwise_decay(whole, 0.5, len)
    with pytest.raises(ValueError, match="scheduled: sgd has no hyperparameter 'eps' of its own"):
        optim.scheduled(optim.sgd(), schedules.constant(0.1), name="eps")
    over = optim.scheduled(whole, schedules.constant(0.5))
    params = make_params()
    grads = make_grads(params, 0)
    assert ts.equal(
        over.apply(params, grads, over.init(params))[0],
        whole.apply(params, grads, whole.init(params), {"lr": 0.5})[0],
    )


def test_values_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"scaled: factor must be at least 0.0, got -1"):
        optim.scaled(optim.sgd(), -1)
    with pytest.raises(ValueError, match=r"layerwise_decay: decay must be in \(0, 1\], got 0"):
        optim.layerwise_decay(optim.sgd(), 0, len)
    optimizer = optim.layerwise_decay(optim.sgd(), 0.5, optim.depth_from_top(1))
    with pytest.raises(ValueError, match=r"depth_of gave -1 for parameter blocks.2.w; a depth is"):
        optimizer.init({"blocks.2.w": torch.zeros(1)})
