"""Losses as sums with weights, and the loss function of a module."""

from types import SimpleNamespace

import pytest
import torch

import trainstep as ts
from support import models
from support.snapshots import untouched

KEY = ts.rng.key(0)


def run(fn, name: str = "mlp", **options) -> ts.Loss:  # type: ignore[no-untyped-def]
    module = models.build(name)
    _, params, buffers = ts.functionalize(module)
    return ts.module_loss(module, fn)(params, buffers, models.batch(), KEY, **options)


def test_value_is_the_total_over_the_weight() -> None:
    assert ts.Loss(torch.tensor(6.0), 4).value.item() == 1.5
    assert ts.Loss(torch.tensor(6.0), torch.tensor(4)).value.item() == 1.5
    assert ts.Loss(torch.tensor(6.0)).value.item() == 6.0


def test_a_mean_is_kept_as_it_is_and_weighs_its_items() -> None:
    mean = torch.tensor(0.1)
    loss = ts.Loss.from_mean(mean, 3)
    assert loss.value is mean
    assert (loss.total.item(), loss.weight) == (pytest.approx(0.3), 3)
    assert loss.root == (mean, 3.0)
    assert ts.Loss(mean, 3).root == (mean, 1.0)


def test_a_scalar_is_the_mean_over_the_leading_axis() -> None:
    module, data = models.build("mlp"), models.batch(5)
    _, params, buffers = ts.functionalize(module)
    with untouched(module, params, data):
        loss = ts.module_loss(module, models.mean_loss)(params, buffers, data, KEY)
    assert loss.weight == 5
    assert torch.equal(loss.value, models.mean_loss(module, data))


def test_a_loss_passes_through_with_the_buffers_of_the_call() -> None:
    def fn(call, batch):  # type: ignore[no-untyped-def]
        return ts.Loss(call(batch["x"]).sum(), batch["w"].sum(), aux={"seen": batch["w"].sum()})

    loss = run(fn, "batch_norm")
    assert torch.equal(loss.weight, models.batch()["w"].sum())
    assert loss.aux["seen"] is loss.weight or torch.equal(loss.aux["seen"], loss.weight)
    assert loss.buffers is not None
    assert loss.buffers["1.num_batches_tracked"] == 1


def test_buffers_given_by_the_loss_win() -> None:
    mine = {"mine": torch.ones(1)}
    loss = run(lambda call, b: ts.Loss(call(b["x"]).sum(), buffers=mine), "batch_norm")
    assert loss.buffers is mine


@pytest.mark.parametrize("name", models.RANDOM)
def test_randomness_is_a_function_of_the_key(name: str) -> None:
    module, data = models.build(name), models.batch()
    _, params, buffers = ts.functionalize(module)
    loss_fn = ts.module_loss(module, models.mean_loss)
    with untouched(module, params):
        first, second, other = (
            loss_fn(params, buffers, data, key).value for key in (KEY, KEY, ts.rng.key(1))
        )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_evaluation_mode_draws_nothing_and_keeps_buffers() -> None:
    losses = [run(models.mean_loss, "dropout", train=False).value for _ in range(2)]
    assert torch.equal(*losses)
    loss = run(models.mean_loss, "batch_norm", train=False)
    assert loss.buffers is not None
    assert loss.buffers["1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (
            lambda call, b: (call(b["x"]) - b["y"]) ** 2,
            ValueError,
            r"zero-dimensional, got shape \(6, 2\)\. Reduce it with \.mean\(\)",
        ),
        (
            lambda call, b: ts.Loss(call(b["x"]).sum(dim=0), 6),
            ValueError,
            r"zero-dimensional, got shape \(2,\)",
        ),
        (
            lambda call, b: SimpleNamespace(loss=call(b["x"]).mean()),
            TypeError,
            r"got SimpleNamespace\. If the model returns a record, pick its loss",
        ),
        (lambda call, b: None, TypeError, "got NoneType"),
        (lambda call, b: 1.0, TypeError, "got float"),
    ],
)
def test_what_is_no_loss_is_refused(fn, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        run(fn)


def test_aux_may_be_numbers() -> None:
    kept = torch.tensor(2.0)
    loss = ts.Loss(torch.tensor(6.0), 4, aux={"n": 0.1, "hits": 3, "kept": kept})
    assert loss.aux["n"].item() == 0.1, "with the bits of the number"
    assert loss.aux["hits"].dtype is torch.int64
    assert loss.aux["kept"] is kept
    with pytest.raises(TypeError, match=r"aux\['name'\] must be a tensor or a number, got str"):
        ts.Loss(torch.tensor(6.0), aux={"name": "x"})  # type: ignore[dict-item]
