"""Gradients, and their accumulation: any split of a batch equals the batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import models
from support.snapshots import untouched
from trainstep.grads import Accumulator

KEY = ts.rng.key(0)


def setup(name: str = "mlp", dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    module = models.build(name, dtype)
    return (module, *ts.functionalize(module)[1:])


def weighted(call: Any, data: dict[str, Tensor]) -> ts.Loss:
    """Squared error summed over items that count ``w`` times, as tokens in a ragged batch do."""
    errors = ((call(data["x"]) - data["y"]) ** 2).sum(dim=1)
    return ts.Loss((errors * data["w"]).sum(), data["w"].sum(), aux={"plain": errors.sum()})


def cut(data: dict[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    pieces = {n: t.split(list(sizes)) for n, t in data.items()}
    return [{n: pieces[n][i] for n in data} for i in range(len(sizes))]


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-15)


def test_value_and_grad_leaves_its_arguments_alone() -> None:
    module, params, buffers = setup("batch_norm")
    data = models.batch(dtype=torch.float64)
    with untouched(module, params, buffers, data):
        loss, grads = ts.value_and_grad(ts.module_loss(module, models.mean_loss))(
            params, buffers, data, KEY
        )
    assert grads.keys() == params.keys()
    assert not loss.value.requires_grad
    assert not any(g.requires_grad for g in grads.values())


def test_gradients_equal_those_of_torch_func_in_eager_mode() -> None:
    module, params, buffers = setup("mlp", torch.float32)
    data, loss_fn = models.batch(), ts.module_loss(module, models.mean_loss)
    _, grads = ts.value_and_grad(loss_fn)(params, buffers, data, KEY)
    functional = torch.func.grad(
        lambda p: models.mean_loss(lambda x: torch.func.functional_call(module, p, (x,)), data)
    )(params)
    assert ts.equal(grads, functional)


def test_any_function_of_params_is_a_loss() -> None:
    def quadratic(params: ts.types.Params, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss((params["w"] * batch).sum() ** 2, 1)

    params = {"w": torch.tensor([1.0, 2.0]), "unused": torch.ones(1)}
    loss, grads = ts.value_and_grad(quadratic)(params, {}, torch.tensor([3.0, 1.0]), KEY)
    assert loss.value.item() == 25.0
    assert grads["w"].tolist() == [30.0, 10.0]
    assert "unused" not in grads, "no gradient is not a gradient of zero"


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 3), (4, 1, 1), (1,) * 6])
@pytest.mark.parametrize("fn", [models.mean_loss, weighted])
def test_any_split_equals_one_batch(fn: Any, sizes: tuple[int, ...]) -> None:
    module, params, buffers = setup()
    data, loss_fn = models.batch(dtype=torch.float64), ts.module_loss(module, fn)
    whole, expected = ts.value_and_grad(loss_fn)(params, buffers, data, KEY)
    pieces = cut(data, *sizes)
    with untouched(module, params, pieces):
        loss, grads = ts.accumulate(loss_fn, params, buffers, pieces, KEY)
    assert_close(grads, expected)
    assert float(loss.weight) == pytest.approx(float(whole.weight), rel=1e-12)
    named = {"value": whole.value, "total": whole.total, **whole.aux}
    assert_close({"value": loss.value, "total": loss.total, **loss.aux}, named)


def test_microbatches_of_no_weight_count_for_nothing() -> None:
    module, params, buffers = setup()
    data, loss_fn = models.batch(dtype=torch.float64), ts.module_loss(module, weighted)
    data["w"] = torch.tensor([0, 0, 1, 2, 0, 0])
    _, expected = ts.value_and_grad(loss_fn)(params, buffers, cut(data, 2, 2, 2)[1], KEY)
    loss, grads = ts.accumulate(loss_fn, params, buffers, cut(data, 2, 2, 2), KEY)
    assert_close(grads, expected)
    assert loss.weight == 3


@pytest.mark.parametrize("name", models.MODELS)
def test_one_microbatch_has_the_bits_of_backward(name: str) -> None:
    module, params, buffers = setup(name, torch.float32)
    plain, data = models.build(name), models.batch()
    loss, grads = ts.accumulate(
        ts.module_loss(module, models.mean_loss), params, buffers, [data], KEY
    )
    with ts.rng.seeded(KEY.fold_in(0)):
        value = models.mean_loss(plain, data)
        value.backward()
    assert torch.equal(loss.value, value.detach())
    assert ts.equal(grads, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_parts_have_the_bits_of_the_plain_loop(parts: int, dtype: torch.dtype) -> None:
    # The plain loop divides each loss by the number of parts, we divide the sum: for powers of two
    # both are exact, so the bits agree.
    module, params, buffers = setup("mlp", dtype)
    plain, data = models.build("mlp", dtype), models.batch(parts * 3, dtype=dtype)
    pieces = cut(data, *[3] * parts)
    loss, grads = ts.accumulate(
        ts.module_loss(module, models.mean_loss), params, buffers, pieces, KEY
    )
    values = [models.mean_loss(plain, piece) / parts for piece in pieces]
    for value in values:
        value.backward()
    assert ts.equal(grads, {n: p.grad for n, p in plain.named_parameters()})
    assert torch.equal(loss.value, sum(v.detach() for v in values))
    assert loss.weight == parts * 3


def test_three_equal_parts_are_within_rounding_of_the_plain_loop() -> None:
    module, params, buffers = setup("mlp", torch.float32)
    plain, data = models.build("mlp"), models.batch(9)
    pieces = cut(data, 3, 3, 3)
    _, grads = ts.accumulate(ts.module_loss(module, models.mean_loss), params, buffers, pieces, KEY)
    for piece in pieces:
        (models.mean_loss(plain, piece) / 3).backward()
    assert_close(grads, {n: p.grad for n, p in plain.named_parameters()}, rtol=1e-5)


@pytest.mark.parametrize("name", models.STATEFUL)
def test_each_microbatch_sees_the_buffers_of_the_one_before(name: str) -> None:
    module, params, buffers = setup(name)
    plain, pieces = models.build(name, torch.float64), cut(models.batch(dtype=torch.float64), 2, 4)
    loss_fn = ts.module_loss(module, models.mean_loss)
    with untouched(module, params, buffers):
        loss, _ = ts.accumulate(loss_fn, params, buffers, pieces, KEY)
    for piece in pieces:
        plain(piece["x"])
    assert ts.equal(loss.buffers, dict(plain.named_buffers()))


def test_each_microbatch_has_a_key_of_its_own() -> None:
    seen: list[ts.Key] = []

    def record(params: Any, buffers: Any, batch: Any, key: ts.Key) -> ts.Loss:
        seen.append(key)
        return ts.Loss(params["w"].sum())

    ts.accumulate(record, {"w": torch.ones(1)}, {}, [None] * 3, KEY)
    assert seen == [KEY.fold_in(i) for i in range(3)]


def test_a_generator_is_consumed_lazily() -> None:
    module, params, buffers = setup()
    events: list[str] = []

    def fn(call: Any, data: dict[str, Tensor]) -> Tensor:
        events.append("used")
        return models.mean_loss(call, data)

    def source() -> Iterator[dict[str, Tensor]]:
        for piece in cut(models.batch(dtype=torch.float64), 2, 2, 2):
            events.append("made")
            yield piece

    ts.accumulate(ts.module_loss(module, fn), params, buffers, source(), KEY)
    assert events == ["made", "used"] * 3


def test_an_accumulator_can_be_fed_by_hand() -> None:
    module, params, buffers = setup()
    loss_fn, pieces = (
        ts.module_loss(module, models.mean_loss),
        cut(models.batch(dtype=torch.float64), 2, 4),
    )
    total = Accumulator(loss_fn, params, buffers, KEY)
    losses = [total.add(piece) for piece in pieces]
    assert [loss.weight for loss in losses] == [2, 4]
    assert total.count == 2
    by_hand = total.finish()
    at_once = ts.accumulate(loss_fn, params, buffers, pieces, KEY)
    assert ts.equal(by_hand[1], at_once[1])
    assert torch.equal(by_hand[0].value, at_once[0].value)


OUTSIDE = models.build("mlp", torch.float64)  # a module that is not called through ``call``


@pytest.mark.parametrize(
    "fn",
    [
        lambda call, data: data["y"].mean(),
        lambda call, data: call(data["x"]).detach().mean(),
        lambda call, data: torch.tensor(call(data["x"]).mean().item()),
        lambda call, data: OUTSIDE(data["x"]).mean(),
    ],
)
def test_a_loss_without_gradient_is_explained(fn: Any) -> None:
    module, params, buffers = setup()
    grad_fn = ts.value_and_grad(ts.module_loss(module, fn))
    text = r"does not depend on any trainable parameter \(parameters: 0\.weight, 0\.bias"
    with untouched(module, params), pytest.raises(ValueError, match=text):
        grad_fn(params, buffers, models.batch(dtype=torch.float64), KEY)


def test_no_microbatches_are_explained() -> None:
    module, params, buffers = setup()
    with pytest.raises(ValueError, match="no micro-batches; the batch is empty"):
        ts.accumulate(ts.module_loss(module, models.mean_loss), params, buffers, [], KEY)


@pytest.mark.parametrize("order", ["sequential", "tree"])
def test_the_module_itself_trains_nothing_and_says_so(order: Any) -> None:
    module = models.build("mlp")
    step = ts.make_step(
        ts.module_loss(module, lambda call, data: module(data["x"]).mean()),
        ts.optim.sgd(),
        microbatches=2,
        order=order,
    )
    with pytest.raises(ValueError, match=r"output of call\(\.\.\.\), not of the module itself"):
        step(step.init(module), models.batch())
