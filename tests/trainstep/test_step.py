"""The whole step: equal to the plain loop, and to itself however it is split, donated or resumed."""

import json
from collections import UserDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import loops, models
from support.snapshots import untouched
from trainstep.batches import split_batch


def make(name: str = "mlp", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Return a step over a model, and its state at step 0."""
    module = models.build(name, dtype)
    options.setdefault("optimizer", ts.optim.adamw(lr=0.01))
    step = ts.make_step(ts.module_loss(module, models.mean_loss), **options)
    return step, step.init(module, seed=1)


def run(step: Any, state: ts.TrainState, batches: list[Any]) -> tuple[ts.TrainState, list[Any]]:
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, history


# Dropout is left out here: a plain loop draws from a stream, a pure step from its key.
@pytest.mark.parametrize("name", [n for n in models.MODELS if n not in models.RANDOM])
@pytest.mark.parametrize("parts", [1, 2])
def test_bits_of_the_plain_loop(name: str, parts: int) -> None:
    schedule = ts.schedules.linear(0.02, total_steps=10, warmup_steps=3)
    step, state = make(
        name,
        optimizer=ts.optim.adamw(weight_decay=0.1),
        schedule=schedule,
        transforms=(ts.transforms.clip_by_global_norm(0.5),),
        microbatches=parts,
    )
    plain = models.build(name)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1, fused=True)
    lambdas = torch.optim.lr_scheduler.LambdaLR(adamw, schedule)
    batches = models.batches(8)
    expected = loops.train(
        plain, adamw, batches, models.mean_loss, scheduler=lambdas, max_norm=0.5, parts=parts
    )
    state, history = run(step, state, batches)
    loops.assert_same_tensors({**state.params, **state.buffers}, plain)
    for ours, theirs in zip(history, expected, strict=True):
        assert torch.equal(ours["loss"], theirs["loss"])
        assert torch.equal(ours["grad_norm"], theirs["grad_norm"])
        assert ours["lr"].item() == theirs["lr"]
        assert ours["weight"].item() == 6
    assert (state.step, len(history)) == (8, 8)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", models.MODELS)
def test_a_step_is_pure(name: str, parts: int) -> None:
    step, state = make(name, microbatches=parts, transforms=(ts.transforms.clip_by_global_norm(1),))
    module, batch = step.loss_fn.apply.module, models.batch()
    state, _ = step(state, batch)
    before = ts.digest(state)
    with untouched(module, state, batch):
        first, second = step(state, batch), step(state, batch)
    assert ts.digest(state) == before
    assert ts.digest(first[0]) == ts.digest(second[0])
    assert ts.equal(first[1], second[1])
    assert ts.diff(first[0], state)


@pytest.mark.parametrize("name", models.RANDOM)
def test_randomness_is_a_function_of_key_and_step(name: str) -> None:
    step, state = make(name, schedule=ts.schedules.constant(0.0))
    batch = models.batch()
    losses = [step(state.evolve(step=i), batch)[1]["loss"].item() for i in range(4)]
    losses += [step(state.evolve(key=ts.rng.key(9)), batch)[1]["loss"].item()]
    assert len(set(losses)) == 5


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_micro_batches_equal_one_batch(parts: int) -> None:
    options: dict[str, Any] = {"optimizer": ts.optim.sgd(lr=0.1, momentum=0.9)}
    whole, state = make("mlp", torch.float64, **options)
    split, _ = make("mlp", torch.float64, microbatches=parts, **options)
    batches = models.batches(5, n=7, dtype=torch.float64)
    expected, history = run(whole, state, batches)
    found, pieces = run(split, state, batches)
    for name, tensor in found.params.items():
        torch.testing.assert_close(tensor, expected.params[name], rtol=1e-12, atol=1e-14)
    for a, b in zip(history, pieces, strict=True):
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-12, atol=0)
        assert a["weight"] == b["weight"] == 7


def test_iterables_of_micro_batches_are_consumed_lazily_and_equal_the_split() -> None:
    step, state = make(microbatches="iter")
    split, _ = make(microbatches=3)
    batch, alive = models.batch(), []

    def source() -> Iterator[dict[str, Tensor]]:
        for i in range(3):
            alive.append(i)
            yield {n: t.tensor_split(3)[i] for n, t in batch.items()}

    found, _ = step(state, source())
    assert alive == [0, 1, 2]
    assert ts.equal(found, split(state, batch)[0])
    assert ts.equal(step(state, list(source()))[0], found)


def test_token_weights_over_uneven_micro_batches() -> None:
    module = models.build("mlp", torch.float64)

    def loss(call: Any, data: dict[str, Tensor]) -> ts.Loss:
        errors = ((call(data["x"]) - data["y"]) ** 2).sum(dim=1)
        return ts.Loss((errors * data["w"]).sum(), data["w"].sum(), aux={"errors": errors.sum()})

    optimizer, batch = ts.optim.sgd(lr=0.1), models.batch(7, dtype=torch.float64)
    state = ts.init(module, optimizer)
    whole, split = (
        ts.make_step(ts.module_loss(module, loss), optimizer, microbatches=n)(state, batch)
        for n in (1, 3)
    )
    for name in state.params:
        torch.testing.assert_close(
            whole[0].params[name], split[0].params[name], rtol=1e-12, atol=1e-15
        )
    for name in ("loss", "errors", "grad_norm"):
        torch.testing.assert_close(whole[1][name], split[1][name], rtol=1e-12, atol=0)
    assert whole[1]["weight"] == split[1]["weight"] == batch["w"].sum()


@pytest.mark.parametrize("at", [0, 1, 4, 6])
@pytest.mark.parametrize("name", ["dropout", "checkpointed", "batch_norm"])
def test_interrupted_and_resumed_equals_uninterrupted(name: str, at: int) -> None:
    options: dict[str, Any] = {
        "microbatches": 2,
        "on_nonfinite": "skip",
        "schedule": ts.schedules.cosine(0.02, 6, 2),
    }
    step, state = make(name, **options)
    batches = models.batches(6)
    expected, _ = run(step, state, batches)
    half, _ = run(step, state, batches[:at])
    tensors, metadata = ts.serialize.to_flat(half)
    stored = json.loads(json.dumps(metadata))
    again = ts.serialize.from_flat({n: t.clone() for n, t in tensors.items()}, stored)
    fresh, _ = make(name, **options)  # as another process would
    resumed, _ = run(fresh, again, batches[at:])
    assert ts.digest(resumed) == ts.digest(expected)


def test_a_dict_of_tensors_trains_without_a_module() -> None:
    def loss(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss(((params["w"] - batch) ** 2).sum(), batch.numel())

    start = {"w": torch.zeros(3)}
    step = ts.make_step(loss, ts.optim.sgd(lr=0.5))
    state = ts.init(start, step.optimizer)
    with untouched(start):
        for _ in range(30):
            state, metrics = step(state, torch.ones(3))
    assert metrics["loss"].item() < 1e-6
    assert state.buffers == {}


def test_metrics_are_detached_scalars() -> None:
    step, state = make(transforms=(ts.transforms.clip_by_global_norm(1e-3),))
    _, metrics = step(state, models.batch())
    assert set(metrics) == {"loss", "grad_norm", "weight", "lr"}
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
    assert metrics["grad_norm"] > 1e-3, "measured before the transforms"
    assert metrics["lr"].item() == 0.01


def test_the_rate_is_a_function_of_the_step() -> None:
    step, state = make(schedule=ts.schedules.linear(1.0, total_steps=4))
    _, metrics = step(state.evolve(step=3), models.batch())
    assert metrics["lr"].item() == 0.25


def test_transforms_run_in_order_and_keep_their_state() -> None:
    def count(grads: Any, state: Any, params: Any, context: Any) -> Any:
        return grads, state + 1

    counting = ts.Transform("count", count, lambda params: torch.zeros((), dtype=torch.int64))

    def double(grads: Any, state: Any, params: Any, context: Any) -> Any:
        return {n: g * 2 for n, g in grads.items()}, state

    clip = ts.transforms.clip_by_global_norm(1e-2)
    transforms = [(clip, counting, ts.Transform("double", double))]
    transforms += [(ts.Transform("double", double), counting, clip)]
    moved = []
    for chosen in transforms:
        step, state = make(optimizer=ts.optim.sgd(lr=1.0), transforms=chosen)
        for start in (state, state.evolve(extras={})):  # as made by step.init, and by ts.init
            after, _ = run(step, start, models.batches(3))
            assert after.extras["transforms"][1] == 3
        difference = {
            n: state.params[n] - step(state, models.batch())[0].params[n] for n in state.params
        }
        moved.append(ts.tree.global_norm(difference.values()).item())
    assert moved == pytest.approx([2e-2, 1e-2], rel=1e-3)


def test_evaluation_changes_nothing_and_draws_nothing() -> None:
    for name in ("dropout", "batch_norm"):
        step, state = make(name)
        evaluate = ts.make_eval_step(step.loss_fn)
        module, batch = step.loss_fn.apply.module, models.batch()
        with untouched(module, state, batch):
            metrics = evaluate(state, batch)
        plain = models.build(name).eval()
        assert torch.equal(metrics["loss"], models.mean_loss(plain, batch).detach())
        assert metrics["weight"] == 6
        assert not metrics["loss"].requires_grad


def test_evaluation_of_a_loss_that_knows_no_mode() -> None:
    def loss(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss((params["w"] * batch).sum(), 2, aux={"twice": 2 * params["w"].sum()})

    state = ts.init({"w": torch.tensor([1.0, 2.0])}, ts.optim.sgd())
    metrics = ts.make_eval_step(loss)(state, torch.tensor([1.0, 1.0]))
    assert {n: m.item() for n, m in metrics.items()} == {"loss": 1.5, "weight": 2, "twice": 3.0}


def test_init_takes_copies_unless_told_not_to() -> None:
    module = models.build("batch_norm")
    own = dict(module.named_parameters())
    for copy in (True, False):
        state = ts.init(module, ts.optim.adamw(), copy=copy)
        assert all((p.data_ptr() == own[n].data_ptr()) != copy for n, p in state.params.items())
    assert state.key == ts.rng.key(0)
    assert ts.init(module, ts.optim.adamw(), seed=5).key == ts.rng.key(5)


@pytest.mark.parametrize("batch", ["rows differ", "too short", "no tensors", "scalar"])
def test_a_batch_that_cannot_be_split_is_explained(batch: str) -> None:
    step, state = make(microbatches=4)
    given = {
        "rows differ": {"x": torch.zeros(8, 4), "y": torch.zeros(6, 2)},
        "too short": {"x": torch.zeros(3, 4), "y": torch.zeros(3, 2)},
        "no tensors": {"x": "text"},
        "scalar": {"x": torch.zeros(())},
    }[batch]
    text = {
        "rows differ": r"same leading axis, at least 4 long; got x: \(8, 4\), y: \(6, 2\)",
        "too short": r"make_step\(microbatches=4\).*got x: \(3, 4\), y: \(3, 2\)",
        "no tensors": "got no tensors",
        "scalar": r"got x: \(\)",
    }[batch]
    with pytest.raises(ValueError, match=text):
        step(state, given)


def test_leaves_without_a_leading_axis_go_to_every_part() -> None:
    module = models.build("mlp")
    seen: list[Any] = []

    def loss(call: Any, data: dict[str, Any]) -> Tensor:
        seen.append((len(data["x"]), data["scale"].item(), data["name"]))
        return models.mean_loss(call, data) * data["scale"]

    step = ts.make_step(ts.module_loss(module, loss), ts.optim.sgd(), microbatches=4)
    step(step.init(module), {**models.batch(6), "scale": torch.tensor(2.0), "name": "it"})
    assert seen == [(2, 2.0, "it"), (2, 2.0, "it"), (1, 2.0, "it"), (1, 2.0, "it")]


@pytest.mark.parametrize("value", [0, -1, 2.0, "all", None])
def test_unknown_microbatches_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r'an int of at least 1, or "iter"; got '):
        make(microbatches=value)


def test_unknown_answer_to_nonfinite_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"ignore", "skip" or "raise"; got \'warn\''):
        make(on_nonfinite="warn")


def test_a_model_with_nothing_to_train_is_refused() -> None:
    module = models.build("mlp").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        ts.init(module, ts.optim.sgd())


def test_an_exception_in_the_loss_leaves_everything_as_it_was() -> None:
    module = models.build("batch_norm")

    def loss(call: Any, data: dict[str, Tensor]) -> Tensor:
        call(data["x"])
        raise ArithmeticError("late")

    step = ts.make_step(ts.module_loss(module, loss), ts.optim.sgd())
    state = step.init(module)
    with untouched(module, state), pytest.raises(ArithmeticError, match="late"):
        step(state, models.batch())


def test_mappings_arrays_and_lists_are_split_with_the_tensors() -> None:
    seen: list[Any] = []

    def loss(call: Any, data: dict[str, Any]) -> Tensor:
        assert type(data) is dict
        seen.append((len(data["x"]), data["ids"].tolist(), data["texts"], data["size"]))
        return models.mean_loss(call, data)

    module = models.build("mlp")
    optimizer = ts.optim.sgd(lr=0.1)
    step = ts.make_step(ts.module_loss(module, loss), optimizer, microbatches=2)
    more = {"ids": np.arange(5), "texts": list("abcde"), "size": [4, 4], "rate": np.float32(1)}
    after, _ = step(step.init(module), UserDict({**models.batch(5), **more}))
    assert seen == [(3, [0, 1, 2], list("abc"), [4, 4]), (2, [3, 4], list("de"), [4, 4])]
    plain = ts.make_step(ts.module_loss(module, models.mean_loss), optimizer, microbatches=2)
    assert ts.equal(after, plain(plain.init(module), models.batch(5))[0])


def test_nested_mappings_and_lists_of_tensors_are_containers() -> None:
    x, y = torch.arange(4), torch.arange(8).reshape(4, 2)
    batch = UserDict({"pair": [x, y], "in": UserDict({"x": x}), "shape": (4, 4, 4, 4)})
    parts: Any = split_batch(batch, 2)
    expected = {"pair": [x[2:], y[2:]], "in": {"x": x[2:]}, "shape": (4, 4, 4, 4)}
    assert ts.equal(parts[1], expected)
    with pytest.raises(ValueError, match=r"got x: \(4,\), ids: \(3,\)"):
        split_batch({"x": x, "ids": np.arange(3)}, 2)


def test_micro_batches_of_arrays_weigh_what_they_hold() -> None:
    module = models.build("mlp", torch.float64)

    def loss(call: Any, data: dict[str, Any]) -> Tensor:
        return models.mean_loss(call, {n: torch.from_numpy(a) for n, a in data.items()})

    batch = {n: t.numpy() for n, t in models.batch(5, dtype=torch.float64).items()}
    metrics = [
        ts.make_step(ts.module_loss(module, loss), ts.optim.sgd(), microbatches=n)(
            ts.init(module, ts.optim.sgd()), batch
        )[1]
        for n in (1, 2)
    ]
    assert [m["weight"].item() for m in metrics] == [5, 5]
    torch.testing.assert_close(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr", "weight", "skipped", "loss_scale"])
def test_aux_may_not_take_the_name_of_a_metric(name: str) -> None:
    module = models.build("mlp")

    def loss(call: Any, data: dict[str, Any]) -> ts.Loss:
        return ts.Loss(call(data["x"]).sum(), 6, aux={name: 1.0, "mine": 3.0})

    step = ts.make_step(ts.module_loss(module, loss), ts.optim.sgd())
    state, evaluate = step.init(module), ts.make_eval_step(step.loss_fn)
    with pytest.raises(ValueError, match=f"make_step: the loss's aux has {name}, which make_step"):
        step(state, models.batch())
    if name in ("loss", "weight"):
        with pytest.raises(ValueError, match=f"make_eval_step: the loss's aux has {name}, which"):
            evaluate(state, models.batch())
    else:
        assert evaluate(state, models.batch())["mine"] == 0.5


def test_where_the_rate_of_the_metrics_comes_from() -> None:
    split = ts.optim.partition(lambda n: "a", {"a": ts.optim.sgd(lr=0.1)})
    inner = ts.optim.scheduled(ts.optim.sgd(), ts.schedules.constant(0.1))
    for optimizer in (split, inner):
        step, state = make(optimizer=optimizer)
        assert "lr" not in step(state, models.batch())[1]
    step, state = make(optimizer=split, schedule=ts.schedules.constant(0.5))
    assert step(state, models.batch())[1]["lr"] == 0.5
    step, state = make(optimizer=ts.optim.scaled(ts.optim.sgd(lr=0.1), 2.0))
    assert step(state, models.batch())[1]["lr"].item() == 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": 0.1}, r"schedule must be .*, got float; .*schedules\.constant\(rate\)"),
        (
            {"transforms": (ts.transforms.clip_by_global_norm,)},
            r"transforms\[0\] must be a Transform, got the function clip_by_global_norm; call it",
        ),
        ({"transforms": ts.transforms.clip_by_global_norm}, r"transforms\[0\] .*; call it"),
        (
            {"transforms": [ts.transforms.clip_by_value(1.0), ts.optim.ema(ts.optim.sgd())]},
            r"transforms\[1\] must be a Transform, got the optimizer ema\(sgd\); give it as",
        ),
        ({"transforms": (1.0,)}, r"transforms\[0\] must be a Transform, got float; see"),
        ({"optimizer": ts.optim.adamw}, "optimizer must be .*, got the function adamw; call it"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)},
            r"optimizer must be .*, got SGD; of a torch\.optim class, .* with trainstep\.optim\.from_t",
        ),
    ],
)
def test_parts_of_another_kind_are_explained(options: dict[str, Any], text: str) -> None:
    module = models.build("mlp")
    given = {"optimizer": ts.optim.sgd(), **options}
    with pytest.raises(TypeError, match=f"make_step: {text}"):
        ts.make_step(ts.module_loss(module, models.mean_loss), **given)


def test_a_single_transform_needs_no_tuple() -> None:
    clip = ts.transforms.clip_by_global_norm(1e-3)
    (one, state), (other, _) = make(transforms=clip), make(transforms=(clip,))
    assert ts.equal(one(state, models.batch()), other(state, models.batch()))


def test_rates_are_rounded_on_a_gpu_and_nothing_else_is() -> None:
    """A graph reads rates as float32 from the device; an update with other values is in none."""
    seen: dict[str, Any] = {}
    names = ("lr", "beta1", "group1/lr", "group1/beta1")
    spy = ts.Optimizer(
        "spy",
        lambda params: {},
        lambda params, grads, state, hyper: seen.update(hyper),
        accepts=frozenset(names),
        capturable=True,
    )
    param: Any = SimpleNamespace(is_cuda=True)
    state: Any = SimpleNamespace(params={"w": param}, opt_state={})
    step = ts.donate(ts.make_step(lambda *_: ts.Loss(0, 1), spy))
    step._apply(state, {"w": param}, dict.fromkeys(names, 0.1))

    assert seen == {n: float(np.float32(0.1)) if n.endswith("lr") else 0.1 for n in names}
