"""What holds for every ensemble: members are single runs, whatever the step is made of."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainstep as ts
from strategies import SUBJECTS, Run, Setup, about, build, setups
from support import models
from support.snapshots import untouched
from trainstep import optim, vmap
from trainstep.curvature import gradient_noise_scale, hvp

every_part = pytest.mark.parametrize("subject", SUBJECTS, ids="-".join)
few = settings(max_examples=max(2, settings().max_examples // 12))

VECTORIZABLE = ("mlp", "dropout", "batch_norm", "frozen", "tied", "counting")


def states_of(run: Run, setup: Setup, count: int) -> list[ts.TrainState]:
    """Return states with weights and keys of their own."""
    return [
        run.step.init(models.build(setup.model, setup.dtype, setup.seed + i), seed=i)
        for i in range(count)
    ]


@every_part
@few
@given(data=st.data())
def test_exact_ensembles_are_single_runs_to_the_last_bit(
    subject: tuple[str, str], data: st.DataObject
) -> None:
    setup = data.draw(about(subject))
    run = build(setup)
    singles = states_of(run, setup, data.draw(st.integers(1, 3)))
    stacked = vmap.stack(singles)
    together = vmap.ensemble(run.step, exact=True)
    for batch in run.batches:
        after, metrics = together(stacked, batch)
        pairs = [run.step(single, batch) for single in singles]
        singles = [single for single, _ in pairs]
        assert ts.equal(vmap.stack(singles), after)
        for name, values in metrics.items():
            assert ts.equal(values, torch.stack([seen[name] for _, seen in pairs]))
        stacked = after


@every_part
@few
@given(data=st.data())
def test_vectorized_steps_are_pure_and_donation_has_the_same_bits(
    subject: tuple[str, str], data: st.DataObject
) -> None:
    setup = data.draw(about(subject).filter(lambda drawn: drawn.model in VECTORIZABLE))
    run = build(setup)
    states = states_of(run, setup, data.draw(st.integers(1, 3)))
    together = vmap.ensemble(run.step)
    state, given_away = vmap.stack(states), vmap.stack(states)
    for batch in run.batches:
        with untouched(run.module, state, batch):
            after, metrics = together(state, batch)
        torch.manual_seed(after.step)
        given_away, seen = together.donated()(given_away, batch)
        assert ts.digest(given_away) == ts.digest(after)
        assert ts.equal(metrics, seen)
        state = after


@given(setup=setups(), count=st.integers(1, 4))
def test_unstack_inverts_stack_after_training(setup: Setup, count: int) -> None:
    run = build(setup)
    states = [run.train(state) for state in states_of(run, setup, count)]
    stacked = vmap.stack(states)
    assert [ts.digest(m) for m in vmap.unstack(stacked)] == [ts.digest(s) for s in states]
    assert ts.digest(vmap.stack(vmap.unstack(stacked))) == ts.digest(stacked)


@given(
    name=st.sampled_from(("mlp", "frozen", "tied", "counting")),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**16),
    count=st.integers(1, 5),
    size=st.integers(3, 12),
    parts=st.integers(1, 3),
    own=st.booleans(),
)
def test_vectorized_gradients_differ_by_rounding_only(
    name: str, dtype: torch.dtype, seed: int, count: int, size: int, parts: int, own: bool
) -> None:
    modules = [models.build(name, dtype, seed + i) for i in range(count)]
    loss = ts.module_loss(modules[0], models.mean_loss)
    step = ts.make_step(loss, optim.sgd(lr=1.0), microbatches=parts)
    states = [step.init(module, seed=i) for i, module in enumerate(modules)]
    each = [models.batch(size, seed + (i if own else 0), dtype) for i in range(count)]
    batch = {n: torch.stack([b[n] for b in each]) for n in each[0]} if own else each[0]
    together = vmap.ensemble(step, in_axes=0 if own else None)
    after, _ = together(vmap.stack(states), batch)
    for state, member, data in zip(states, vmap.unstack(after), each, strict=True):
        _, grads = ts.accumulate(
            loss, state.params, state.buffers, split(data, parts), step.loss_key(state)
        )
        largest = max(max(g.abs().max(), state.params[n].abs().max()) for n, g in grads.items())
        for key, grad in grads.items():
            gap = (state.params[key] - member.params[key] - grad).abs().max()
            assert gap <= 16 * torch.finfo(dtype).eps * largest


def split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    cut = {name: tensor.tensor_split(parts) for name, tensor in batch.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(parts)]


@given(
    seed=st.integers(0, 2**16),
    order=st.permutations(range(3)),
    exact=st.booleans(),
)
def test_members_may_be_permuted(seed: int, order: list[int], exact: bool) -> None:
    modules = [models.build("mlp", torch.float64, seed + i) for i in range(3)]
    step = ts.make_step(ts.module_loss(modules[0], models.mean_loss), optim.adamw())
    states = [step.init(module, seed=i) for i, module in enumerate(modules)]
    together = vmap.ensemble(step, exact=exact)
    batch = models.batch(seed=seed, dtype=torch.float64)
    after = vmap.unstack(together(vmap.stack(states), batch)[0])
    turned = vmap.unstack(together(vmap.stack([states[i] for i in order]), batch)[0])
    for place, index in enumerate(order):
        assert turned[place].key == after[index].key
        for name, param in after[index].params.items():
            tolerance: dict[str, float] = {"rtol": 0, "atol": 0 if exact else 1e-7}
            torch.testing.assert_close(turned[place].params[name], param, **tolerance)


@given(
    name=st.sampled_from(("mlp", "frozen", "tied", "dropout")),
    seed=st.integers(0, 2**16),
    size=st.integers(1, 8),
    chunk=st.one_of(st.none(), st.integers(1, 4)),
)
def test_per_sample_gradients_are_those_of_a_loop(
    name: str, seed: int, size: int, chunk: int | None
) -> None:
    module, key = models.build(name, torch.float64, seed), ts.rng.key(seed)
    _, params, buffers = ts.functionalize(module)
    loss, batch = ts.module_loss(module, models.mean_loss), models.batch(size, seed, torch.float64)
    fn = vmap.per_sample_grads(loss, randomness="same", chunk_size=chunk)
    grads: dict[str, Any] = fn(params, buffers, batch, key)
    for i in range(size):
        sample = {n: t[i : i + 1] for n, t in batch.items()}
        _, expected = ts.value_and_grad(loss)(params, buffers, sample, key)
        limit = 16 * torch.finfo(torch.float64).eps * max(g.abs().max() for g in expected.values())
        for n, grad in expected.items():
            assert (grads[n][i] - grad).abs().max() <= limit


@given(seed=st.integers(0, 2**16), scale=st.floats(-4, 4))
def test_hessian_vector_products_are_linear(seed: int, scale: float) -> None:
    module, key = models.build("mlp", torch.float64, seed), ts.rng.key(seed)
    _, params, buffers = ts.functionalize(module)
    product = hvp(ts.module_loss(module, models.mean_loss))
    batch = models.batch(seed=seed, dtype=torch.float64)
    gen = torch.Generator().manual_seed(seed)
    u, v = (
        {n: torch.randn(p.shape, generator=gen, dtype=p.dtype) for n, p in params.items()}
        for _ in range(2)
    )
    both = {n: scale * u[n] + v[n] for n in params}
    hu, hv, hboth = (product(params, buffers, batch, key, w) for w in (u, v, both))
    for n in params:
        torch.testing.assert_close(hboth[n], scale * hu[n] + hv[n], rtol=1e-9, atol=1e-9)


@given(
    signal=st.floats(0.01, 100),
    noise=st.floats(0.01, 100),
    small=st.integers(1, 64),
    more=st.integers(1, 64),
)
def test_the_noise_scale_inverts_its_model(
    signal: float, noise: float, small: int, more: int
) -> None:
    big = small + more
    norms = [torch.tensor(signal + noise / b, dtype=torch.float64).sqrt() for b in (small, big)]
    found = gradient_noise_scale(norms[:1], norms[1:], small, big)
    torch.testing.assert_close(found.signal.item(), signal, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.noise.item(), noise, rtol=1e-7, atol=1e-9)
