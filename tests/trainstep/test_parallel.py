"""Data-parallel steps, on one process and on ranks that are threads."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import models
from support.fake_ranks import Ranks
from trainstep import collectives


def noisy(params: Any, buffers: Any, batch: Any, key: ts.Key) -> ts.Loss:
    """A loss with random numbers from a generator of its own: threads share the global one."""
    noise = torch.rand(batch["x"].shape, generator=ts.rng.generator(key))
    error = (batch["x"] + noise) @ params["a"] - batch["y"].sum(1) + params["b"]
    seen = {"seen": buffers["seen"] + len(error)} if "seen" in buffers else buffers
    return ts.Loss(error.square().sum(), len(error), seen, {"worst": error.abs().max()})


def parts(n: int) -> list[dict[str, Tensor]]:
    return [models.batch(1 + i % 3, seed=i) for i in range(n)]


def params() -> dict[str, Tensor]:
    return {"a": torch.linspace(-1, 1, models.IN), "b": torch.tensor(0.3)}


def make(**options: Any) -> ts.Step:
    chosen: dict[str, Any] = {"microbatches": "iter", "order": "tree"} | options
    schedule = ts.schedules.cosine(0.05, total_steps=9)
    clip = ts.transforms.clip_by_global_norm(1.0)
    return ts.make_step(noisy, ts.optim.adamw(), schedule, (clip,), **chosen)


def train(step: Any, state: ts.TrainState, batches: list[Any]) -> tuple[ts.TrainState, Any]:
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("donated", [True, False])
def test_alone_it_is_the_step(exact: bool, donated: bool) -> None:
    step = make()
    data = [parts(5), parts(3)]
    expected, metrics = train(step, step.init(params(), 1), data)
    parallel = ts.data_parallel(ts.donate(step) if donated else step, exact=exact)
    state, found = train(parallel, parallel.init(params(), 1), data)
    assert ts.digest(state) == ts.digest(expected)
    assert ts.digest(found) == ts.digest(metrics)


def test_a_module_alone_with_dropout_and_split_batches() -> None:
    model = models.build("dropout")
    loss = ts.module_loss(model, models.mean_loss)
    step = ts.make_step(loss, ts.optim.sgd(0.1), microbatches=3, order="tree")
    batch = models.batch(7)
    expected, _ = step(step.init(model), batch)
    found, _ = ts.data_parallel(step, exact=True)(step.init(model), batch)
    assert ts.digest(found) == ts.digest(expected)


@pytest.mark.parametrize("order", ["sequential", "tree"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_trains_alike(ranks: int, order: Any) -> None:
    step = make(order=order)
    data = [parts(6), parts(7)]
    start = step.init(params(), 1)
    expected, metrics = train(step, start, data)
    parallel = ts.data_parallel(step)
    found = Ranks(ranks).run(
        lambda rank: train(parallel, start, [batch[rank::ranks] for batch in data])
    )
    assert len({ts.digest(pair) for pair in found}) == 1
    state, figures = found[0]
    for name, value in expected.params.items():
        torch.testing.assert_close(state.params[name], value, rtol=1e-5, atol=1e-6)
    assert figures.keys() == metrics.keys()
    assert figures["weight"] == metrics["weight"]
    torch.testing.assert_close(figures["loss"], metrics["loss"])


def test_it_is_pure() -> None:
    step = make()
    state, batch = step.init(params(), 1), parts(4)
    before = ts.digest([state, batch])
    parallel = ts.data_parallel(step, exact=True)
    once, again = (
        Ranks(2).run(lambda rank: ts.digest(parallel(state, batch[rank::2]))) for _ in range(2)
    )
    assert once == again
    assert ts.digest([state, batch]) == before


def test_lazy_micro_batches_are_taken_one_at_a_time() -> None:
    left: list[int] = []

    def stream() -> Any:
        for number, part in enumerate(parts(3)):
            left.append(number)
            yield part

    step = make(order="sequential")
    state, _ = ts.data_parallel(step)(step.init(params()), stream())
    assert left == [0, 1, 2]
    assert state.step == 1


def test_one_bad_rank_makes_all_skip() -> None:
    step = make(on_nonfinite="skip")
    start = step.init(params(), 1)
    batch = parts(4)
    batch[1]["x"] = batch[1]["x"] * float("nan")
    parallel = ts.data_parallel(step)
    for state, metrics in Ranks(2).run(lambda rank: parallel(start, batch[rank::2])):
        assert metrics["skipped"].item() == 1
        assert ts.equal(state.params, start.params)


def test_a_loss_scale_leaves_the_bits() -> None:
    scale = ts.DynamicScale(init_scale=2.0**7)
    plain, scaled = make(), make(loss_scale=scale)
    batch = parts(4)

    def run(step: ts.Step) -> list[Any]:
        start, parallel = step.init(params(), 1), ts.data_parallel(step, exact=True)
        return Ranks(2).run(lambda rank: parallel(start, batch[rank::2])[0].params)

    assert ts.equal(run(plain), run(scaled))


@pytest.mark.parametrize("follow", [True, False])
def test_buffers_are_those_of_rank_0_unless_asked_otherwise(follow: bool) -> None:
    step = make()
    start = step.init(params()).evolve(buffers={"seen": torch.tensor(0), "still": torch.ones(2)})
    parallel = ts.data_parallel(step, broadcast_buffers=follow)
    batch = parts(4)  # of 1, 2, 3 and 1 samples
    found = Ranks(2).run(lambda rank: parallel(start, batch[rank::2])[0].buffers)
    seen = [buffers["seen"].item() for buffers in found]
    assert seen == ([4, 4] if follow else [4, 3])


def partial(params: Any, buffers: Any, batch: Any, key: ts.Key) -> ts.Loss:
    name = "a" if batch["x"][0, 0] < 0 else "b"
    return ts.Loss((params[name] * batch["x"]).sum(), 1)


def test_parameters_that_other_ranks_reach() -> None:
    start_params = {name: torch.ones(3) for name in ("a", "b", "c")}
    step = ts.make_step(
        partial, ts.optim.sgd(0.1, weight_decay=0.5), microbatches="iter", order="tree"
    )
    start = step.init(start_params)
    batch = [{"x": torch.full((1, 3), float(sign))} for sign in (-1, 1)]
    expected, _ = step(start, batch)
    assert torch.equal(expected.params["c"], torch.ones(3))  # not reached, so not decayed
    parallel = ts.data_parallel(step, exact=True, find_unused_parameters=True)
    for state, _ in Ranks(2).run(lambda rank: parallel(start, batch[rank::2])):
        assert ts.digest(state) == ts.digest(expected)
    with pytest.raises(
        ValueError, match=r"rank 0 does not depend on b, c. .*find_unused_parameters"
    ):
        ts.data_parallel(step)(start, batch[:1])


def test_initial_states_are_rank_0s() -> None:
    parallel = ts.data_parallel(make())
    starts = [{n: t + rank for n, t in params().items()} for rank in range(2)]
    expected = make().init(starts[0], 5)
    for state in Ranks(2).run(lambda rank: parallel.init(starts[rank], 5)):
        assert ts.digest(state) == ts.digest(expected)


def test_a_step_by_hand_has_the_same_bits() -> None:
    """What the guide shows."""
    step = make()
    start, batch = step.init(params(), 1), parts(6)
    expected, _ = step(start, batch)

    def by_hand(rank: int) -> ts.TrainState:
        world = collectives.size()
        own = ts.sum_gradients(
            step.loss_fn,
            start.params,
            start.buffers,
            batch[rank::world],
            step.loss_key(start),
            order="tree",
            positions=range(rank, len(batch), world),
        )
        loss, grads = collectives.tree_sum(own).mean()
        return step.update(start, loss, grads)[0]

    for state in Ranks(4).run(by_hand):
        assert ts.digest(state) == ts.digest(expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="expected what make_step returned, got CapturedStep"):
        ts.data_parallel(ts.capture(make()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no micro-batches"):
        ts.data_parallel(make(), exact=True)(make().init(params()), [])

    def check(rank: int) -> None:
        with pytest.raises(ValueError, match=r"data_parallel\(exact=True\): .* power of two"):
            ts.data_parallel(make(), exact=True)

    Ranks(3).run(check)


@pytest.mark.parametrize("exact", [True, False])
def test_captured_on_the_cpu_it_is_donated(exact: bool) -> None:
    step = make()
    data = [parts(6), parts(7)]
    parallel = ts.data_parallel(step, exact=exact)

    def both(rank: int) -> tuple[str, str]:
        mine = [batch[rank::2] for batch in data]
        captured = ts.capture(parallel)
        assert captured.optimizer is step.optimizer
        found = train(captured, captured.init(params(), 1), mine)
        return ts.digest(found), ts.digest(train(parallel, parallel.init(params(), 1), mine))

    (found, expected), others = Ranks(2).run(both)
    assert found == expected
    assert others == (found, expected)


def test_what_is_recorded_is_the_gradient_of_all_ranks() -> None:
    step = make()
    state = step.init(params(), 1)
    key = ts.rng.key(5)

    def both(rank: int) -> tuple[Any, Any, Any]:
        mine = parts(6)[rank::2]
        captured = ts.capture(ts.data_parallel(step, exact=True))
        (loss, grads), (again, _) = (captured._accumulate(state, mine, k) for k in (key, key))
        other, _ = captured._accumulate(state, mine, ts.rng.key(6))
        return (loss.total, grads), again.total, other.total

    first, second = Ranks(2).run(both)
    loss, grads = ts.grads.accumulate(
        step.loss_fn, state.params, state.buffers, parts(6), key, order="tree"
    )
    for found, again, other in (first, second):
        assert ts.digest(found) == ts.digest((loss.total, grads))
        assert torch.equal(again, loss.total)
        assert not torch.equal(other, loss.total)


def test_what_cannot_be_recorded_is_refused() -> None:
    step = make()
    ts.data_parallel(step).check_recordable()  # alone there is nothing to exchange
    with pytest.raises(ts.CaptureError, match="find_unused_parameters=True waits for the device"):
        ts.data_parallel(step, find_unused_parameters=True).check_recordable()
    ranks = Ranks(2)
    through = r"through cpu:threads,cuda:threads, and only NCCL can be recorded.*or do not capture"
    with pytest.raises(ts.CaptureError, match=through):
        ranks.run(lambda rank: ts.data_parallel(step).check_recordable())
    ranks = Ranks(2)
    ranks.backends = "cpu:gloo,cuda:nccl"
    ranks.run(lambda rank: ts.data_parallel(step).check_recordable())
