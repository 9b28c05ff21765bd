"""``ema`` keeps an average beside training, and ``ema_params`` finds it anywhere."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import get_ema_multi_avg_fn

import trainstep as ts
from support.optimizers import by_axes
from support.reference import make_grads, make_params
from trainstep import optim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_is_unchanged_and_the_average_has_torchs_bits(dtype: torch.dtype) -> None:
    rule, average_of = optim.adamw(lr=0.1), get_ema_multi_avg_fn(0.9)
    optimizer = optim.ema(rule, 0.9)
    params = other = make_params(dtype)
    state, kept = optimizer.init(params), rule.init(params)
    averages = {n: p.clone() for n, p in params.items()}
    for step in range(8):
        grads = make_grads(params, step)
        params, state = optimizer.apply(params, grads, state)
        other, kept = rule.apply(other, grads, kept)
        average_of(list(averages.values()), list(other.values()), 1)
        assert ts.equal(params, other)
        assert ts.equal(optim.ema_params(state), averages)
    assert ts.equal(state["optimizer"], kept)


def test_warmup_forgets_the_start_sooner() -> None:
    optimizer = optim.ema(optim.sgd(lr=0.1), 0.5, warmup=True)
    params = make_params(torch.float64)
    state, expected = optimizer.init(params), params["embed"]
    for t in range(12):
        params, state = optimizer.apply(params, make_grads(params, t), state)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * params["embed"]
        torch.testing.assert_close(optim.ema_params(state)["embed"], expected)
    assert decay == 0.5


def test_a_float32_average_of_bfloat16_parameters_keeps_small_steps() -> None:
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    grads = {"w": torch.ones(1, dtype=torch.bfloat16)}
    optimizers = [optim.ema(optim.sgd(lr=0.5), 0.999, dtype=d) for d in (None, torch.float32)]
    found = []
    for optimizer in optimizers:
        new, state = optimizer.apply(params, grads, optimizer.init(params))
        found.append(optim.ema_params(state)["w"])
        assert optim.ema_params(state, new)["w"].dtype == torch.bfloat16
    assert found[0] == 1.0
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], torch.tensor([1 - 0.001 * 0.5]))


def test_a_parameter_without_gradient_keeps_its_average() -> None:
    optimizer, params = optim.ema(optim.sgd(), 0.5, warmup=True), make_params()
    after, state = optimizer.apply(params, {"scale": torch.tensor(1.0)}, optimizer.init(params))
    changed = ts.diff(optim.ema_params(state, after), params)
    assert [d.path for d in changed] == ["scale"]
    assert state["ema"]["step"]["scale"] == 1
    assert state["ema"]["step"]["embed"] == 0


def test_evaluating_on_the_average() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loss = ts.module_loss(model, lambda call, batch: mse_loss(call(batch["x"]), batch["y"]))
    optimizer = optim.ema(optim.sgd(lr=0.1), 0.5)
    step, evaluate = ts.make_step(loss, optimizer), ts.make_eval_step(loss)
    state = ts.init(model, optimizer)
    batch = {"x": torch.randn(8, 3), "y": torch.randn(8, 1)}
    expected = dict(state.params)
    for _ in range(3):
        state, _ = step(state, batch)
        expected = {n: torch.lerp(a, state.params[n], 0.5) for n, a in expected.items()}
    on_average = evaluate(state.evolve(params=optim.ema_params(state)), batch)["loss"]
    assert torch.equal(on_average, evaluate(state.evolve(params=expected), batch)["loss"])
    assert not torch.equal(on_average, evaluate(state, batch)["loss"])


def test_averages_are_found_inside_other_optimizers_and_under_any_label() -> None:
    averaged = optim.chain(optim.ema(optim.adamw(lr=0.1), 0.5))
    optimizer = optim.lookahead(
        optim.partition(
            lambda n, p: {"matrix": "ema", "rest": "average"}[by_axes(n, p)],
            {"ema": averaged, "average": optim.sgd(lr=0.1)},
        )
    )
    params = make_params()
    state = ts.init(params, optimizer)
    new, kept = optimizer.apply(params, make_grads(params, 0), state.opt_state)
    state = state.evolve(params=new, opt_state=kept)
    assert set(optim.ema_params(kept)) == {"embed", "a.weight", "b.weight"}
    found = optim.ema_params(state)
    assert {d.path for d in ts.diff(found, state.params)} == {"embed", "a.weight", "b.weight"}


def test_of_two_averages_the_outer_one_is_found() -> None:
    optimizer, params = optim.ema(optim.ema(optim.sgd(lr=1.0), 0.9), 0.0), make_params()
    after, state = optimizer.apply(params, make_grads(params, 0), optimizer.init(params))
    assert ts.equal(optim.ema_params(state), after)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"optim.ema: decay must be in \[0.0, 1.0\), got 1.0"):
        optim.ema(optim.sgd(), 1.0)
    with pytest.raises(
        ValueError, match=r"the state has no average; wrap the optimizer: optim.ema"
    ):
        optim.ema_params(ts.init(make_params(), optim.adamw()))
