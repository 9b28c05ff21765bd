"""Ensembles: many models trained at once are as many models trained one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trainstep as ts
from support import models
from support.optimizers import OPTIMIZERS
from support.snapshots import untouched
from trainstep import optim, schedules, transforms, vmap

K = 3
VECTORIZABLE = ("mlp", "batch_norm", "frozen", "tied", "counting")


class Attention(nn.Module):
    """One attention layer over the two halves of ``x``."""

    def __init__(self, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.body = nn.Linear(2, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        parts = self.qkv(self.body(x.reshape(n, 2, 2))).reshape(n, 2, 3, 2, 4)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0
        )
        return self.head(mixed.transpose(1, 2).reshape(n, 2, 8).mean(dim=1))


def make(
    model: str | Callable[[], nn.Module] = "mlp",
    optimizer: ts.Optimizer | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    loss: Callable[..., Any] = models.mean_loss,
    count: int = K,
    **options: Any,
) -> tuple[ts.Step, list[ts.TrainState]]:
    """Return a step and the states of several members, with weights and keys of their own."""

    def build(seed: int) -> nn.Module:
        if isinstance(model, str):
            return models.build(model, dtype, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model().to(dtype)

    step = ts.make_step(ts.module_loss(build(0), loss), optimizer or optim.sgd(lr=1.0), **options)
    return step, [step.init(build(i), seed=i) for i in range(count)]


def run(step: Any, state: ts.TrainState, batches: Sequence[Any]) -> ts.TrainState:
    for batch in batches:
        state, _ = step(state, batch)
    return state


def data(count: int = 4, n: int = 6, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return models.batches(count, n, dtype)


def spread(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference, in units in the last place of the largest entry of all."""
    largest = max(t.abs().max().item() for t in theirs.values())
    gap = max((ours[n] - theirs[n]).abs().max().item() for n in theirs)
    return gap / (largest * torch.finfo(next(iter(theirs.values())).dtype).eps)


def gradients(after: ts.TrainState, before: ts.TrainState) -> dict[str, Tensor]:
    """Return what SGD with a rate of 1 went down by."""
    return {n: before.params[n] - after.params[n] for n in before.params}


# Exact: member by member


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_exact_members_are_single_runs_to_the_last_bit(name: str, microbatches: int) -> None:
    step, states = make(
        name,
        optim.adamw(),
        dtype=torch.float32,
        schedule=schedules.cosine(0.01, 10, 2),
        transforms=(transforms.clip_by_global_norm(0.1), transforms.add_noise()),
        microbatches=microbatches,
    )
    batches = data(dtype=torch.float32)
    together = run(vmap.ensemble(step, exact=True), vmap.stack(states), batches)
    singles = [run(step, state, batches) for state in states]
    assert ts.equal(together, vmap.stack(singles))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_with_every_optimizer(name: str) -> None:
    step, states = make("dropout", OPTIMIZERS[name]())
    together = run(vmap.ensemble(step, exact=True), vmap.stack(states), data())
    assert ts.equal(together, vmap.stack([run(step, state, data()) for state in states]))


def test_exact_takes_an_iterator_of_microbatches() -> None:
    step, states = make("mlp", microbatches="iter")
    together, _ = vmap.ensemble(step, exact=True)(vmap.stack(states), iter(data(3)))
    assert ts.equal(together, vmap.stack([step(state, data(3))[0] for state in states]))


# Vectorized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("order", ["sequential", "tree"])
@pytest.mark.parametrize("name", VECTORIZABLE)
def test_vectorized_gradients_are_those_of_single_steps_up_to_rounding(
    name: str, order: Any, microbatches: int, dtype: torch.dtype
) -> None:
    step, states = make(name, dtype=dtype, microbatches=microbatches, order=order)
    batch = models.batch(12, dtype=dtype)
    after, metrics = vmap.ensemble(step)(vmap.stack(states), batch)
    for i, (state, member) in enumerate(zip(states, vmap.unstack(after), strict=True)):
        expected, seen = step(state, batch)
        assert spread(gradients(member, state), gradients(expected, state)) <= 16
        assert metrics.keys() == seen.keys()
        for key, value in seen.items():
            assert metrics[key].shape == (K,)
            assert metrics[key].dtype == value.dtype
            torch.testing.assert_close(metrics[key][i], value)
        for key, buffer in expected.buffers.items():
            torch.testing.assert_close(member.buffers[key], buffer)
        assert member.key == expected.key
        assert member.step == 1


@pytest.mark.parametrize("name", VECTORIZABLE)
def test_a_vectorized_run_stays_close_to_single_runs(name: str) -> None:
    step, states = make(
        name,
        optim.adamw(),
        schedule=schedules.linear(0.01, 20),
        transforms=(transforms.clip_by_global_norm(0.1),),
    )
    together = run(vmap.ensemble(step), vmap.stack(states), data(10))
    for state, member in zip(states, vmap.unstack(together), strict=True):
        single = run(step, state, data(10))
        for key, param in single.params.items():
            torch.testing.assert_close(member.params[key], param, rtol=1e-6, atol=1e-8)


class Elementwise(nn.Module):
    """A loss whose gradient is one multiplication: no sum whose order could matter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 3))
        self.b = nn.Parameter(torch.randn(7))
        self.c = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a**2).sum() * x + (self.b**2).sum() * x + (self.c**2).sum() * x


def scaled_by_batch(call: Callable[..., Tensor], batch: Tensor) -> ts.Loss:
    return ts.Loss(call(batch))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_on_equal_gradients_have_equal_bits(name: str) -> None:
    step, states = make(
        Elementwise,
        OPTIMIZERS[name](),
        loss=scaled_by_batch,
        transforms=(transforms.clip_by_value(0.5), transforms.clip_by_global_norm(1.0)),
    )
    batches = [torch.tensor(float(i + 1)) for i in range(5)]
    together = run(vmap.ensemble(step), vmap.stack(states), batches)
    singles = vmap.stack([run(step, state, batches) for state in states])
    assert ts.equal(together, singles)


def test_parameters_that_the_loss_does_not_reach_are_left_alone() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    step, states = make(Partial, optim.adamw(weight_decay=0.5))
    after = run(vmap.ensemble(step), vmap.stack(states), data(2))
    assert torch.equal(after.params["idle.weight"][1], states[1].params["idle.weight"])
    assert not torch.equal(after.params["used.weight"][1], states[1].params["used.weight"])


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
def test_attention_is_vectorized_without_a_warning(options: dict[str, bool]) -> None:
    step, states = make(lambda: Attention(**options), dtype=torch.float32)
    batch = models.batch()
    after, _ = vmap.ensemble(step)(vmap.stack(states), batch)
    for state, member in zip(states, vmap.unstack(after), strict=True):
        expected, _ = step(state, batch)
        assert spread(gradients(member, state), gradients(expected, state)) <= 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_attention_on_cuda(exact: bool, dtype: torch.dtype) -> None:
    step, states = make(Attention, dtype=dtype)
    states = [ts.tree.map(lambda leaf: leaf.cuda(), state) for state in states]
    batch = {name: tensor.cuda() for name, tensor in models.batch(64, dtype=dtype).items()}
    after, _ = vmap.ensemble(step, exact=exact)(vmap.stack(states), batch)
    for state, member in zip(states, vmap.unstack(after), strict=True):
        expected, _ = step(state, batch)
        limit = 0 if exact else 16
        assert spread(gradients(member, state), gradients(expected, state)) <= limit


def test_attention_settings_are_put_back() -> None:
    step, states = make(Attention)
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    vmap.ensemble(step)(vmap.stack(states), data()[0])
    after = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    assert before == after == (True, True)


def test_token_weights_and_aux_are_per_member() -> None:
    def tokens(call: Callable[..., Tensor], batch: dict[str, Tensor]) -> ts.Loss:
        errors = ((call(batch["x"]) - batch["y"]) ** 2).sum(dim=1)
        return ts.Loss((errors * batch["w"]).sum(), batch["w"].sum(), aux={"plain": errors.sum()})

    step, states = make("mlp", loss=tokens, microbatches=2)
    own = [models.batch(7, seed=i, dtype=torch.float64) for i in range(K)]
    batch = {name: torch.stack([each[name] for each in own]) for name in own[0]}
    after, metrics = vmap.ensemble(step, in_axes=0)(vmap.stack(states), batch)
    for i, (state, member) in enumerate(zip(states, vmap.unstack(after), strict=True)):
        expected, seen = step(state, own[i])
        assert spread(gradients(member, state), gradients(expected, state)) <= 16
        assert metrics["weight"][i] == seen["weight"] == own[i]["w"].sum()
        torch.testing.assert_close(metrics["plain"][i], seen["plain"])


# Batches


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_batches_of_their_own(axis: int, microbatches: int, exact: bool) -> None:
    step, states = make("mlp", microbatches=microbatches)
    own = [models.batch(5, seed=i, dtype=torch.float64)["x"] for i in range(K)]
    y = models.batch(5, dtype=torch.float64)["y"]
    batch = {"x": torch.stack(own, dim=axis), "y": y}
    together = vmap.ensemble(step, in_axes={"x": axis, "y": None}, exact=exact)
    for i, member in enumerate(vmap.unstack(together(vmap.stack(states), batch)[0])):
        expected, _ = step(states[i], {"x": own[i], "y": y})
        limit = 0 if exact else 16
        assert spread(gradients(member, states[i]), gradients(expected, states[i])) <= limit


def test_a_value_per_member_goes_to_every_microbatch() -> None:
    def tempered(call: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        return batch["factor"] * models.mean_loss(call, batch)

    step, states = make("mlp", loss=tempered, microbatches=2)
    factors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    batch = models.batch(6, dtype=torch.float64)
    axes = {**dict.fromkeys(batch), "factor": 0}
    after, _ = vmap.ensemble(step, in_axes=axes)(vmap.stack(states), {**batch, "factor": factors})
    for i, member in enumerate(vmap.unstack(after)):
        expected, _ = step(states[i], {**batch, "factor": factors[i]})
        assert spread(gradients(member, states[i]), gradients(expected, states[i])) <= 16


def test_microbatches_from_an_iterator_with_axes() -> None:
    step, states = make("mlp", microbatches="iter")
    own = [data(3) for _ in range(K)]
    parts = [{n: torch.stack([o[p][n] for o in own]) for n in own[0][p]} for p in range(3)]
    together = vmap.ensemble(step, in_axes=0, exact=True)
    after, _ = together(vmap.stack(states), iter(parts))
    assert ts.equal(after, vmap.stack([step(s, o)[0] for s, o in zip(states, own, strict=True)]))
    close, _ = vmap.ensemble(step, in_axes=0)(vmap.stack(states), iter(parts))
    assert spread(close.params, after.params) <= 16


@pytest.mark.parametrize("exact", [True, False])
def test_a_member_axis_of_another_length_is_named(exact: bool) -> None:
    step, states = make("mlp")
    message = r"x has shape \(6, 4\); with in_axes=0 its axis 0 must be 3 long.*in_axes=None"
    with pytest.raises(ValueError, match=message):
        vmap.ensemble(step, in_axes=0, exact=exact)(vmap.stack(states), data()[0])


def test_axes_by_name_must_fit_the_batch() -> None:
    step, states = make("mlp")
    with pytest.raises(ValueError, match="in_axes has the names x, z, the batch has x, y, w"):
        vmap.ensemble(step, in_axes={"x": 0, "z": None})(vmap.stack(states), data()[0])
    with pytest.raises(TypeError, match="in_axes names x, but the batch is a list"):
        vmap.ensemble(step, in_axes={"x": 0})(vmap.stack(states), [torch.zeros(3)])


def test_mappings_that_are_no_pytrees_are_shared_or_refused() -> None:
    from collections import UserDict

    step, states = make("mlp")
    batch = UserDict(data()[0])
    after, _ = vmap.ensemble(step)(vmap.stack(states), batch)
    assert ts.equal(after, vmap.ensemble(step)(vmap.stack(states), dict(batch))[0])
    with pytest.raises(TypeError, match=r"the batch is a UserDict.*give dict\(batch\)"):
        vmap.ensemble(step, in_axes=0)(vmap.stack(states), batch)


def test_ragged_axes_are_refused_as_by_a_single_step() -> None:
    step, states = make("mlp", microbatches=4)
    batch = {n: torch.stack([t] * K) for n, t in models.batch(3, dtype=torch.float64).items()}
    with pytest.raises(ValueError, match="at least 4 long"):
        vmap.ensemble(step, in_axes=0)(vmap.stack(states), batch)


def test_no_microbatches_are_refused() -> None:
    step, states = make("mlp", microbatches="iter")
    with pytest.raises(ValueError, match="ensemble: no micro-batches"):
        vmap.ensemble(step)(vmap.stack(states), iter(()))


# Hyperparameters


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov", "partition", "from_torch", "ema"])
def test_members_have_learning_rates_of_their_own(name: str, exact: bool) -> None:
    rates = [0.1, schedules.linear(0.2, 10), 0.0]
    step, states = make(Elementwise, OPTIMIZERS[name](), loss=scaled_by_batch)
    batches = [torch.tensor(float(i + 1)) for i in range(4)]
    together = vmap.ensemble(step, lr=rates, exact=exact)
    after = run(together, vmap.stack(states), batches)
    for rate, state, member in zip(rates, states, vmap.unstack(after), strict=True):
        own = schedules.constant(rate) if isinstance(rate, float) else rate
        single = ts.make_step(step.loss_fn, OPTIMIZERS[name](), own)
        assert ts.equal(member, run(single, state, batches))
    _, metrics = together(after, batches[0])
    assert metrics["lr"].tolist() == [0.1, schedules.linear(0.2, 10)(4), 0.0]


def test_members_have_other_hyperparameters_of_their_own() -> None:
    step, states = make(Elementwise, optim.adamw(), loss=scaled_by_batch)
    batches = [torch.tensor(float(i + 1)) for i in range(4)]
    hyper = [{"weight_decay": 0.5}, {}, {"beta1": 0.5, "lr": 0.1}]
    after = run(vmap.ensemble(step, hyper=hyper), vmap.stack(states), batches)
    makers = [
        optim.adamw(weight_decay=0.5), optim.adamw(), optim.adamw(lr=0.1, betas=(0.5, 0.999))
    ]  # fmt: skip
    for optimizer, state, member in zip(makers, states, vmap.unstack(after), strict=True):
        assert ts.equal(member, run(ts.make_step(step.loss_fn, optimizer), state, batches))


@pytest.mark.parametrize("what", ["lr", "hyper"])
def test_there_must_be_one_entry_per_member(what: str) -> None:
    step, states = make("mlp")
    given: Any = {"lr": [0.1, 0.2], "hyper": [{}, {}]}[what]
    with pytest.raises(ValueError, match=f"{what} has 2 entries and the state 3 members"):
        vmap.ensemble(step, **{what: given})(vmap.stack(states), data()[0])


def test_unknown_hyperparameters_are_refused_at_once() -> None:
    step, _ = make("mlp", optim.adamw())
    with pytest.raises(ValueError, match="adamw has no hyperparameter decay; known: beta1, beta2"):
        vmap.ensemble(step, hyper=[{"decay": 0.1}])
    frozen, _ = make("mlp", optim.scheduled(optim.sgd(), schedules.linear(0.1, 5)))
    with pytest.raises(ValueError, match="has no hyperparameter lr"):
        vmap.ensemble(frozen, lr=[0.1])


def test_a_rate_that_would_be_overridden_is_refused() -> None:
    scheduled, _ = make("mlp", schedule=schedules.constant(0.1))
    with pytest.raises(ValueError, match=r"which a schedule would override.*lr=\[...\]"):
        vmap.ensemble(scheduled, hyper=[{"lr": 0.1}])
    plain, _ = make("mlp")
    with pytest.raises(ValueError, match="which a schedule would override"):
        vmap.ensemble(plain, lr=[0.1], hyper=[{"lr": 0.1}])


# Randomness


@pytest.mark.parametrize("model", ["dropout", lambda: Attention(dropout=0.5)])
def test_dropout_draws_for_each_member_and_is_a_function_of_the_keys(model: Any) -> None:
    step, states = make(model)
    same_weights = [states[0].evolve(key=s.key) for s in states]
    together, batch = vmap.ensemble(step), data()[0]
    after, metrics = together(vmap.stack(same_weights), batch)
    assert len(set(metrics["loss"].tolist())) == K
    torch.manual_seed(17)
    assert ts.equal(after, together(vmap.stack(same_weights), batch)[0])
    other = together(vmap.stack([*same_weights[:2], states[0]]), batch)[1]
    assert not torch.equal(other["loss"], metrics["loss"])


def test_draws_differ_between_steps_and_microbatches() -> None:
    def drawn(call: Callable[..., Tensor], batch: Tensor) -> ts.Loss:
        noise = torch.randn((), dtype=torch.float64)
        return ts.Loss(0 * call(batch).sum() + noise, aux={"noise": noise})

    step, states = make("mlp", loss=drawn, microbatches="iter")
    x = data()[0]["x"]
    after, first = vmap.ensemble(step)(vmap.stack(states), [x])
    _, both = vmap.ensemble(step)(vmap.stack(states), [x, x])
    _, second = vmap.ensemble(step)(after, [x])
    values = torch.cat([first["noise"], 2 * both["noise"] - first["noise"], second["noise"]])
    assert len({round(v, 9) for v in values.tolist()}) == 3 * K


def test_the_same_draws_are_those_of_the_first_member_alone() -> None:
    step, states = make("dropout")
    equal_keys = [s.evolve(key=states[0].key) for s in states]
    batch = models.batch(12, dtype=torch.float64)
    after, _ = vmap.ensemble(step, randomness="same")(vmap.stack(equal_keys), batch)
    for state, member in zip(equal_keys, vmap.unstack(after), strict=True):
        expected, _ = step(state, batch)
        assert spread(gradients(member, state), gradients(expected, state)) <= 16


def test_draws_can_be_forbidden() -> None:
    step, states = make("dropout")
    with pytest.raises(RuntimeError, match="random"):
        vmap.ensemble(step, randomness="error")(vmap.stack(states), data()[0])


def test_unknown_randomness_lists_the_choices() -> None:
    with pytest.raises(ValueError, match='must be "different", "same" or "error"; got \'none\''):
        vmap.ensemble(make("mlp")[0], randomness="none")  # type: ignore[arg-type]


# Purity and donation


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("guard", [{}, {"on_nonfinite": "skip"}, {"on_nonfinite": "raise"}])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "dropout", "frozen"])
def test_the_step_is_pure_and_donation_has_the_same_bits(
    name: str, guard: dict[str, Any], exact: bool
) -> None:
    step, states = make(
        name,
        optim.ema(optim.adamw(), 0.9),
        transforms=(transforms.clip_by_global_norm(0.1), transforms.accumulate_every(2)),
        **guard,
    )
    together = vmap.ensemble(step, exact=exact)
    state, given = vmap.stack(states), vmap.stack(states)
    for batch in data():
        with untouched(state, batch):
            after, metrics = together(state, batch)
        before = given
        given, seen = vmap.ensemble(ts.donate(step), exact=exact)(before, batch)
        assert ts.digest(given) == ts.digest(after)
        assert ts.equal(metrics, seen)
        with pytest.raises(RuntimeError, match="was donated at step"):
            before.params  # noqa: B018
        state = after


def test_donation_updates_the_stacked_tensors_in_place() -> None:
    step, states = make("mlp", optim.adamw())
    state = vmap.stack(states)
    held = {**state.params, "moment": state.opt_state["exp_avg"]["0.weight"]}
    after, _ = vmap.ensemble(step).donated()(state, data()[0])
    assert after.params["0.weight"] is held["0.weight"]
    assert after.opt_state["exp_avg"]["0.weight"] is held["moment"]


def test_an_ensemble_is_donated_as_a_step_is() -> None:
    step, states = make("mlp", optim.adamw())
    state, batch = vmap.stack(states), data()[0]
    expected, _ = vmap.ensemble(step)(state, batch)
    after, _ = ts.donate(vmap.ensemble(step))(state, batch)
    assert ts.digest(after) == ts.digest(expected)
    with pytest.raises(RuntimeError, match="was donated at step 0"):
        state.params  # noqa: B018


def test_frozen_parameters_are_not_copied() -> None:
    step, states = make("frozen")
    state = vmap.stack(states)
    after, _ = vmap.ensemble(step)(state, data()[0])
    assert after.buffers["0.weight"] is state.buffers["0.weight"]


# Guards


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("donated", [True, False])
def test_one_member_is_skipped_and_the_others_go_on(exact: bool, donated: bool) -> None:
    step, states = make("batch_norm", optim.adamw(), on_nonfinite="skip")
    batch = {n: torch.stack([t] * K) for n, t in data()[0].items()}
    batch["x"][1, 0, 0] = torch.nan
    together = vmap.ensemble(ts.donate(step) if donated else step, in_axes=0, exact=exact)
    after, metrics = together(vmap.stack(states), batch)
    members = vmap.unstack(after)
    assert metrics["skipped"].tolist() == [0, 1, 0]
    assert after.extras["skipped"].tolist() == [0, 1, 0]
    assert ts.equal(members[1].params, states[1].params)
    assert ts.equal(members[1].buffers, states[1].buffers)
    assert ts.equal(members[1].opt_state, states[1].opt_state)
    assert not ts.equal(members[2].params, states[2].params)
    assert members[2].buffers["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("exact", [True, False])
def test_raising_names_the_member_and_leaves_every_member_alone(exact: bool) -> None:
    step, states = make("mlp", optim.adamw(), on_nonfinite="raise")
    batch = {n: torch.stack([t] * K) for n, t in data()[0].items()}
    batch["x"][1, 0, 0] = torch.nan
    state = vmap.stack(states)
    with (
        untouched(state),
        pytest.raises(FloatingPointError, match="Nothing was updated") as caught,
    ):
        vmap.ensemble(ts.donate(step), in_axes=0, exact=exact)(state, batch)
    assert caught.value.__notes__ == ["ensemble: this is member 1"]


def test_loss_scales_move_member_by_member() -> None:
    scale = ts.DynamicScale(init_scale=8.0, growth_interval=1)
    step, states = make("mlp", optim.adamw(), loss_scale=scale)
    batch = {n: torch.stack([t] * K) for n, t in data()[0].items()}
    batch["x"][2] = torch.inf
    together = vmap.ensemble(step, in_axes=0)
    after, metrics = together(vmap.stack(states), batch)
    assert metrics["loss_scale"].tolist() == [8.0, 8.0, 8.0]
    assert after.extras["loss_scale"]["scale"].tolist() == [16.0, 16.0, 4.0]
    again, metrics = together(after, {n: torch.stack([t] * K) for n, t in data()[1].items()})
    assert metrics["loss_scale"].tolist() == [16.0, 16.0, 4.0]
    single = run(step, states[0], data(2))
    torch.testing.assert_close(vmap.unstack(again)[0].params, single.params)


# What cannot be vectorized


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gru", "gru"),
        ("lstm", "lstm"),
        ("checkpointed", r"gradient checkpointing.*exact=True"),
        ("custom_function", "setup_context"),
        ("spectral_norm", "Batching rule not implemented"),
    ],
)
def test_what_cannot_be_vectorized_says_so_and_what_to_do(name: str, message: str) -> None:
    step, states = make(name)
    state = vmap.stack(states)
    with untouched(state), pytest.raises(RuntimeError, match=message) as caught:
        vmap.ensemble(step)(state, data()[0])
    (note,) = caught.value.__notes__
    assert note.startswith("ensemble: this was raised under torch.func.vmap.")
    assert note.endswith("Use ensemble(step, exact=True), which runs the members one by one.")


def test_reading_a_value_on_the_host_is_explained() -> None:
    def branching(call: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        loss = models.mean_loss(call, batch)
        return loss if loss.item() > 0 else -loss

    step, states = make("mlp", loss=branching)
    with pytest.raises(RuntimeError, match="item") as caught:
        vmap.ensemble(step)(vmap.stack(states), data()[0])
    assert "control flow depends on data" in caught.value.__notes__[0]


def test_checkpointing_with_reentrant_autograd_is_refused_too() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.head, self.body(x).tanh(), use_reentrant=True)

    step, states = make(Reentrant)
    with pytest.raises(RuntimeError, match=r"setup_context|checkpoint"):
        vmap.ensemble(step)(vmap.stack(states), data()[0])


def test_operations_without_a_batching_rule_warn_and_are_right() -> None:
    step, states = make("weight_norm")
    batch = data()[0]
    with pytest.warns(UserWarning, match="performance drop"):
        after, _ = vmap.ensemble(step)(vmap.stack(states), batch)
    for state, member in zip(states, vmap.unstack(after), strict=True):
        expected, _ = step(state, batch)
        assert spread(gradients(member, state), gradients(expected, state)) <= 16


def test_a_loss_without_parameters_is_refused() -> None:
    step, states = make("mlp", loss=lambda call, batch: batch["x"].mean())
    with pytest.raises(ValueError, match="ensemble: the loss does not depend on any trainable"):
        vmap.ensemble(step)(vmap.stack(states), data()[0])


def test_only_steps_make_ensembles_and_only_stacks_are_taken() -> None:
    with pytest.raises(TypeError, match="expected what make_step returned, got <lambda>"):
        vmap.ensemble(lambda state, batch: None)  # type: ignore[arg-type]
    step, states = make("mlp")
    with pytest.raises(TypeError, match="ensemble: expected a stacked state"):
        vmap.ensemble(step)(states[0], data()[0])


def test_the_module_itself_trains_no_member_and_says_so() -> None:
    module = models.build("mlp")
    loss = ts.module_loss(module, lambda call, batch: module(batch["x"]).mean())
    step = ts.make_step(loss, optim.sgd())
    pair = vmap.stack([step.init(module), step.init(module, seed=1)])
    with pytest.raises(
        ValueError, match=r"ensemble: the loss does not depend .* the module itself"
    ):
        vmap.ensemble(step)(pair, models.batch())


def test_a_list_of_states_is_no_stack() -> None:
    module = models.build("mlp")
    step = ts.make_step(ts.module_loss(module, models.mean_loss), optim.sgd())
    text = r"ensemble: expected a stacked state, got a list; .*trainstep\.vmap\.stack\(states\)"
    with pytest.raises(TypeError, match=text):
        vmap.ensemble(step)([step.init(module), step.init(module)], models.batch())


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_as_aux_and_names_that_are_taken(exact: bool) -> None:
    module = models.build("mlp")

    def loss(name: str) -> Any:
        return ts.module_loss(
            module, lambda call, b: ts.Loss(call(b["x"]).sum(), len(b["x"]), aux={name: 3.0})
        )

    step = ts.make_step(loss("n"), optim.sgd())
    pair = vmap.stack([step.init(module), step.init(module, seed=1)])
    _, metrics = vmap.ensemble(step, exact=exact)(pair, models.batch())
    assert metrics["n"].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="aux has lr"):
        vmap.ensemble(ts.make_step(loss("lr"), optim.sgd()), exact=exact)(pair, models.batch())
