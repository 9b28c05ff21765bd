"""Adding micro-batches in a binary tree: shares of ranks add up to the same bits as the whole."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from trainstep.sums import add_in_tree


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def mean_loss(call: Any, batch: Any) -> Tensor:
    return (call(batch["x"]) - batch["y"]).square().mean()


def token_loss(call: Any, batch: Any) -> ts.Loss:
    errors = (call(batch["x"]) - batch["y"]).square().sum(dim=1)
    return ts.Loss((errors * batch["mask"]).sum(), batch["mask"].sum(), aux={"hits": errors.sum()})


def batches(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(2 + i % 3, 4, generator=generator) * 10.0 ** (i % 4),
            "y": torch.randn(2 + i % 3, 3, generator=generator),
            "mask": (torch.arange(2 + i % 3) <= i % 2).float(),
        }
        for i in range(n)
    ]


def sums(fn: Any, given: list[Any], **options: Any) -> ts.Sums:
    model = net()
    _, params, buffers = ts.functionalize(model)
    loss = ts.module_loss(model, fn)
    return ts.sum_gradients(loss, params, buffers, given, ts.Key(3), order="tree", **options)


def content(total: ts.Sums) -> dict[str, Any]:
    weight = torch.as_tensor(total.weight)
    return {"grads": total.grads, "total": total.total, "weight": weight, "aux": total.aux}


@pytest.mark.parametrize("fn", [mean_loss, token_loss])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
def test_the_tree_is_that_of_evens_plus_that_of_odds(n: int, fn: Any) -> None:
    given = batches(n)
    whole = sums(fn, given)
    evens = sums(fn, given[::2], positions=range(0, n, 2))
    odds = sums(fn, given[1::2], positions=range(1, n, 2))
    assert ts.equal(content(evens.add_(odds)), content(whole))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_ranks_gives_the_same_bits(world: int) -> None:
    n = 16
    given = batches(n)
    expected = sums(token_loss, given).mean()
    shares = [
        sums(token_loss, given[rank::world], positions=range(rank, n, world))
        for rank in range(world)
    ]
    loss, grads = add_in_tree(range(world), lambda rank: shares[rank]).mean()
    assert ts.equal(grads, expected[1])
    assert ts.equal(loss.value, expected[0].value)


def test_the_tree_differs_from_the_sequence_only_by_rounding() -> None:
    model, given = net(), batches(7)
    _, params, buffers = ts.functionalize(model)
    loss = ts.module_loss(model, token_loss)
    tree_loss, tree = ts.accumulate(loss, params, buffers, given, ts.Key(3), order="tree")
    line_loss, line = ts.accumulate(loss, params, buffers, given, ts.Key(3))
    assert not ts.equal(tree, line)
    torch.testing.assert_close(tree, line, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tree_loss.value, line_loss.value)


def test_few_sums_exist_at_a_time() -> None:
    alive: weakref.WeakSet[ts.Sums] = weakref.WeakSet()
    most = 0

    def leaf(index: int) -> ts.Sums:
        nonlocal most
        made = ts.Sums({}, torch.tensor(float(index)), 1, {}, {})
        alive.add(made)
        most = max(most, len(alive))
        return made

    total = add_in_tree(range(64), leaf)
    assert total.total.item() == sum(range(64))
    assert total.weight == 64
    assert most <= 7


def test_leaves_are_visited_from_left_to_right() -> None:
    seen: list[int] = []

    def leaf(index: int) -> ts.Sums:
        seen.append(index)
        return ts.Sums({}, torch.zeros(()), 1, {}, {})

    add_in_tree(range(8), leaf)
    assert seen == [0, 4, 2, 6, 1, 5, 3, 7]


def test_a_parameter_that_only_some_batches_reach_gets_their_sum() -> None:
    def loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
        return ts.Loss((params["a"] * batch) if batch < 3 else (params["b"] * batch), 1)

    params = {"a": torch.tensor(1.0), "b": torch.tensor(1.0), "c": torch.tensor(1.0)}
    given = [torch.tensor(float(i)) for i in range(1, 6)]
    total = ts.sum_gradients(loss, params, {}, given, ts.Key(0), order="tree")
    assert {n: g.item() for n, g in total.grads.items()} == {"a": 3.0, "b": 12.0}


@pytest.mark.parametrize("microbatches", [1, 4, "iter"])
def test_steps_take_the_order(microbatches: Any) -> None:
    model = net()
    loss, sgd = ts.module_loss(model, mean_loss), ts.optim.sgd(lr=0.01)
    batch = {name: torch.cat([b[name] for b in batches(6)]) for name in ("x", "y")}
    given: Any = iter(batches(6)) if microbatches == "iter" else batch
    step = ts.make_step(loss, sgd, microbatches=microbatches, order="tree")
    state, metrics = step(step.init(model, seed=4), given)
    parts = batches(6) if microbatches == "iter" else ts.step.split_batch(batch, microbatches)
    start = step.init(model, seed=4)
    key = step.loss_key(start)
    expected = ts.accumulate(loss, start.params, start.buffers, parts, key, order="tree")
    params, _ = sgd.apply(start.params, expected[1], start.opt_state)
    assert ts.equal(state.params, params)
    assert ts.equal(metrics["loss"], expected[0].value)


def test_a_loss_scale_of_a_power_of_two_changes_no_bit() -> None:
    given = batches(5)
    plain = sums(token_loss, given).mean()[1]
    scaled = sums(token_loss, given, scale=torch.tensor(2.0**7)).mean()[1]
    assert ts.equal(plain, scaled)


def test_mistakes_are_named() -> None:
    model = net()
    loss = ts.module_loss(model, mean_loss)
    with pytest.raises(ValueError, match='make_step: order must be "sequential" or "tree"; got'):
        ts.make_step(loss, ts.optim.sgd(), order="ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no micro-batches"):
        sums(mean_loss, [])
    with pytest.raises(ValueError, match="3 positions for 2 micro-batches"):
        sums(mean_loss, batches(2), positions=range(3))
    one, other = (ts.Sums({}, torch.zeros(()), 1, {}, {}, unit=unit) for unit in (1.0, 2.0))
    with pytest.raises(ValueError, match='make both with order="tree"'):
        one.add_(other)
