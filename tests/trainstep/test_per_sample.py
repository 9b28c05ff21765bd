"""Per-sample gradients equal a loop over samples."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainstep as ts
from support import models
from support.snapshots import untouched
from trainstep.vmap import per_sample_grads

KEY = ts.rng.key(3)
Setup = tuple[Any, ts.types.Params, ts.types.Buffers, dict[str, Tensor]]


def setup(
    model: str | nn.Module, dtype: torch.dtype = torch.float64, loss: Any = models.mean_loss
) -> Setup:
    module = models.build(model, dtype) if isinstance(model, str) else model.to(dtype)
    _, params, buffers = ts.functionalize(module)
    return ts.module_loss(module, loss), params, buffers, models.batch(5, dtype=dtype)


def loop(loss_fn: Any, params: Any, buffers: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of single-sample batches, stacked."""
    singles = [
        ts.value_and_grad(loss_fn)(
            params, buffers, {n: t[i : i + 1] for n, t in batch.items()}, KEY
        )
        for i in range(len(batch["x"]))
    ]
    return {n: torch.stack([grads[n] for _, grads in singles]) for n in params}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that gradients differ by at most 16 units in the last place of the largest entry."""
    assert ours.keys() == theirs.keys()
    limit = 16 * max(t.abs().max() * torch.finfo(t.dtype).eps for t in theirs.values())
    for name, grad in theirs.items():
        assert ours[name].shape == grad.shape
        assert ours[name].dtype == grad.dtype
        assert (ours[name] - grad).abs().max() <= limit, name


class Attention(nn.Module):
    """Attention over the two halves of ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(2, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 1, 2, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mlp", "frozen", "tied", "attention"])
def test_equal_to_a_loop_over_samples(name: str, dtype: torch.dtype) -> None:
    loss_fn, params, buffers, batch = setup(Attention() if name == "attention" else name, dtype)
    with untouched(loss_fn.apply.module, params, buffers, batch):
        grads = per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert not any(grad.requires_grad for grad in grads.values())
    assert_close(grads, loop(loss_fn, params, buffers, batch))


def test_weights_divide_each_sample_by_its_own() -> None:
    def tokens(call: Callable[..., Tensor], batch: dict[str, Tensor]) -> ts.Loss:
        errors = ((call(batch["x"]) - batch["y"]) ** 2).sum(dim=1)
        return ts.Loss((errors * batch["w"]).sum(), batch["w"].sum())

    loss_fn, params, buffers, batch = setup("mlp", loss=tokens)
    batch["w"] += 1
    grads = per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert_close(grads, loop(loss_fn, params, buffers, batch))


def test_chunks_give_the_same() -> None:
    loss_fn, params, buffers, batch = setup("mlp")
    whole = per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert_close(per_sample_grads(loss_fn, chunk_size=2)(params, buffers, batch, KEY), whole)


def test_the_mean_over_samples_is_the_gradient_of_the_batch() -> None:
    loss_fn, params, buffers, batch = setup("mlp")
    grads = per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    _, expected = ts.value_and_grad(loss_fn)(params, buffers, batch, KEY)
    assert_close({n: g.mean(dim=0) for n, g in grads.items()}, expected)


def test_dropout_differs_between_samples_and_repeats_with_the_key() -> None:
    loss_fn, params, buffers, batch = setup("dropout")
    batch = {n: t[:1].expand(5, *t.shape[1:]) for n, t in batch.items()}
    grads = per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert len({tuple(g.tolist()) for g in grads["3.weight"].flatten(1)}) > 1
    torch.manual_seed(5)
    assert ts.equal(grads, per_sample_grads(loss_fn)(params, buffers, batch, KEY))
    other = per_sample_grads(loss_fn)(params, buffers, batch, ts.rng.key(4))
    assert not ts.equal(grads, other)


def test_the_same_draws_for_all_samples_are_those_of_the_loop() -> None:
    loss_fn, params, buffers, batch = setup("dropout")
    grads = per_sample_grads(loss_fn, randomness="same")(params, buffers, batch, KEY)
    assert_close(grads, loop(loss_fn, params, buffers, batch))


def test_leaves_without_a_leading_axis_go_to_every_sample() -> None:
    def tempered(call: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
        assert batch["name"] == "kept"
        return batch["factor"] * models.mean_loss(call, batch)

    loss_fn, params, buffers, batch = setup("mlp", loss=tempered)
    plain = per_sample_grads(setup("mlp")[0])(params, buffers, batch, KEY)
    extended = {**batch, "factor": torch.tensor(2.0, dtype=torch.float64), "name": "kept"}
    grads = per_sample_grads(loss_fn)(params, buffers, extended, KEY)
    assert ts.equal(grads, {n: 2 * g for n, g in plain.items()})


def test_parameters_out_of_reach_have_zeros() -> None:
    def quadratic(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss((params["used"] * batch).sum())

    params = {"used": torch.ones(2), "idle": torch.ones(3)}
    grads = per_sample_grads(quadratic)(params, {}, torch.arange(8.0).reshape(4, 2), KEY)
    assert torch.equal(grads["used"], torch.arange(8.0).reshape(4, 2))
    assert torch.equal(grads["idle"], torch.zeros(4, 3))


def test_batch_norm_works_in_evaluation_mode_and_is_refused_in_training() -> None:
    module = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    loss_fn, params, buffers, batch = setup(module)
    batch["x"] = batch["x"].unsqueeze(1)
    evaluating = functools.partial(loss_fn, train=False)
    grads = per_sample_grads(evaluating)(params, buffers, batch, KEY)
    assert_close(grads, loop(evaluating, params, buffers, batch))
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor") as caught:
        per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert "functools.partial(loss_fn, train=False)" in caught.value.__notes__[0]
    assert "value_and_grad(loss_fn)" in caught.value.__notes__[0]


def test_checkpointing_is_refused_with_advice() -> None:
    loss_fn, params, buffers, batch = setup("checkpointed")
    with pytest.raises(RuntimeError, match="gradient checkpointing") as caught:
        per_sample_grads(loss_fn)(params, buffers, batch, KEY)
    assert caught.value.__notes__[0].startswith("per_sample_grads: this was raised under")


@pytest.mark.parametrize("batch", [{"x": torch.ones(2, 4), "y": torch.ones(3, 2)}, {}])
def test_leading_axes_must_agree(batch: dict[str, Tensor]) -> None:
    loss_fn, params, buffers, _ = setup("mlp")
    with pytest.raises(ValueError, match=r"same leading axis.*got lengths (2, 3|of no tensors)"):
        per_sample_grads(loss_fn)(params, buffers, batch, KEY)


def test_unknown_randomness_lists_the_choices() -> None:
    with pytest.raises(ValueError, match='per_sample_grads: randomness must be "different"'):
        per_sample_grads(setup("mlp")[0], randomness="some")  # type: ignore[arg-type]
