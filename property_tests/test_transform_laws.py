"""Algebraic laws of gradient transformations, over drawn shapes, dtypes and values."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainstep as ts
from trainstep import transforms
from trainstep.transforms import Context, Transform

Tree = dict[str, Tensor]

SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
LIMITS = st.floats(0.01, 100.0)


@st.composite
def problems(draw: Any) -> tuple[Tree, Tree]:
    """Draw ``(params, grads)``: a few tensors of mixed shapes and dtypes, some gradients missing."""
    shapes = draw(st.dictionaries(st.sampled_from("abcd"), SHAPES, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    params, grads = {}, {}
    for name, shape in shapes.items():
        dtype, scale = draw(DTYPES), 10.0 ** draw(st.integers(-3, 3))
        params[name] = torch.randn(shape, generator=generator).to(dtype)
        grads[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    missing = draw(st.sampled_from([None, *shapes]))
    if missing is not None and len(grads) > 1:
        del grads[missing]
    return params, grads


TRANSFORMS = st.one_of(
    st.just(transforms.identity()),
    LIMITS.map(transforms.clip_by_global_norm),
    LIMITS.map(transforms.clip_by_value),
    LIMITS.map(transforms.clip_by_parameter_norm),
    LIMITS.map(transforms.adaptive_clip),
    st.builds(transforms.add_noise, st.floats(0.0, 1.0), seed=st.integers(0, 3)),
    st.just(transforms.centralize()),
    st.just(transforms.zero_nonfinite()),
    LIMITS.map(transforms.scale_by_trust_ratio),
    st.integers(1, 3).map(transforms.accumulate_every),
)
NORM_CLIPS = st.sampled_from(
    [transforms.clip_by_global_norm, transforms.clip_by_parameter_norm, transforms.adaptive_clip]
)


def run(transform: Transform, problem: tuple[Tree, Tree], calls: int = 4) -> list[Tree]:
    """Return what comes out of several calls, with gradients that differ from call to call."""
    params, grads = problem
    state, out = transform.init(params), []
    for step in range(calls):
        given_ = {n: g * (step + 1) for n, g in grads.items()}
        after, state = transform.update(given_, state, params, Context(step, ts.Key(step)))
        out.append(after)
    return out


def norm(grads: Tree) -> float:
    return sum(g.double().square().sum().item() for g in grads.values()) ** 0.5


def slack(grads: Tree) -> float:
    return 1 + 8 * max(torch.finfo(g.dtype).eps for g in grads.values())


@settings(deadline=None)
@given(problems(), TRANSFORMS)
def test_identity_is_neutral(problem: Any, transform: Transform) -> None:
    expected = run(transform, problem)
    identity = transforms.identity()
    assert ts.equal(run(transforms.chain(identity, transform), problem), expected)
    assert ts.equal(run(transforms.chain(transform, identity), problem), expected)
    assert ts.equal(run(transforms.chain(transform), problem), expected)


@settings(deadline=None)
@given(problems())
def test_the_empty_chain_is_the_identity(problem: Any) -> None:
    expected = [{n: g * (step + 1) for n, g in problem[1].items()} for step in range(4)]
    assert ts.equal(run(transforms.chain(), problem), expected)
    assert ts.equal(run(transforms.identity(), problem), expected)


@settings(deadline=None)
@given(problems(), TRANSFORMS, TRANSFORMS, TRANSFORMS)
def test_chain_is_associative(problem: Any, a: Transform, b: Transform, c: Transform) -> None:
    chain = transforms.chain
    flat = run(chain(a, b, c), problem, 6)
    assert ts.equal(run(chain(a, chain(b, c)), problem, 6), flat)
    assert ts.equal(run(chain(chain(a, b), c), problem, 6), flat)


@settings(deadline=None)
@given(problems(), TRANSFORMS, st.integers(0, 3))
def test_pure_and_equal_when_owned(problem: Any, transform: Transform, step: int) -> None:
    params, grads = problem
    state = transform.init(params)
    before = ts.digest((params, grads, state))
    random = torch.random.get_rng_state()
    first = transform.update(grads, state, params, Context(step, ts.Key(3)))
    again = transform.update(grads, state, params, Context(step, ts.Key(3)))
    assert ts.digest((params, grads, state)) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert ts.equal(first, again)
    context = Context(step, ts.Key(3), owned=True, donated=True)
    given_ = ts.tree.clone((grads, state))
    assert ts.equal(transform.update(*given_, params, context), first)


@settings(deadline=None)
@given(problems(), LIMITS)
def test_value_clip_is_bounded_idempotent_and_local(problem: Any, limit: float) -> None:
    params, grads = problem
    transform = transforms.clip_by_value(limit)
    once, _ = transform.update(grads, (), params)
    assert ts.equal(transform.update(once, (), params)[0], once)
    for name, grad in once.items():
        assert bool((grad.abs() <= torch.tensor(limit, dtype=grad.dtype)).all())
        inside = grads[name].abs() < torch.tensor(limit, dtype=grad.dtype)
        assert torch.equal(grad[inside], grads[name][inside])


@settings(deadline=None)
@given(problems(), LIMITS)
def test_norm_clips_bound_the_norm(problem: Any, limit: float) -> None:
    params, grads = problem
    whole, _ = transforms.clip_by_global_norm(limit).update(grads, (), params)
    assert norm(whole) <= min(limit, norm(grads)) * slack(grads)
    single, _ = transforms.clip_by_parameter_norm(limit).update(grads, (), params)
    for name, grad in single.items():
        bound = min(limit, norm({name: grads[name]}))
        assert norm({name: grad}) <= bound * slack(grads)


@settings(deadline=None)
@given(problems(), LIMITS, NORM_CLIPS)
def test_norm_clips_are_idempotent_up_to_rounding(problem: Any, limit: float, make: Any) -> None:
    # Not to the bit: the 1e-6 in the factor and the rounding of norms can shrink a little again.
    params, grads = problem
    transform = make(limit)
    once, _ = transform.update(grads, (), params)
    twice, _ = transform.update(once, (), params)
    for name, grad in once.items():
        tolerance = 2e-6 / limit + 8 * torch.finfo(grad.dtype).eps
        worst = max(torch.finfo(g.dtype).eps for g in grads.values())
        torch.testing.assert_close(twice[name], grad, rtol=tolerance + 4 * worst, atol=0)


@settings(deadline=None)
@given(problems(), st.floats(1.0, 50.0))
def test_a_clip_with_room_changes_no_bit(problem: Any, room: float) -> None:
    params, grads = problem
    limit = norm(grads) * (1 + room) + 1.0
    for make in (
        transforms.clip_by_global_norm,
        transforms.clip_by_parameter_norm,
        transforms.clip_by_value,
    ):
        assert ts.equal(make(limit).update(grads, (), params)[0], grads)


@settings(deadline=None)
@given(problems(), st.floats(-4.0, 4.0))
def test_centralize_is_a_linear_projection(problem: Any, factor: float) -> None:
    params, _ = problem
    generator = torch.Generator().manual_seed(0)
    x, y = (
        {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for n, p in params.items()
        }
        for _ in range(2)
    )

    def centre(grads: Tree) -> Tree:
        return transforms.centralize().update(grads, (), params)[0]

    mixed = centre({n: factor * x[n] + y[n] for n in x})
    for name, grad in mixed.items():
        torch.testing.assert_close(grad, factor * centre(x)[name] + centre(y)[name])
        torch.testing.assert_close(centre(centre(x))[name], centre(x)[name])


@settings(deadline=None)
@given(problems(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_zero_nonfinite_is_an_idempotent_projection(problem: Any, odd: float) -> None:
    params, grads = problem
    transform = transforms.zero_nonfinite()
    assert ts.equal(transform.update(grads, (), params)[0], grads)
    spoiled = {n: g.clone() for n, g in grads.items()}
    for grad in spoiled.values():
        grad.view(-1)[0] = odd
    once, _ = transform.update(spoiled, (), params)
    assert all(bool(g.isfinite().all()) for g in once.values())
    assert ts.equal(transform.update(once, (), params)[0], once)


@settings(deadline=None)
@given(problems(), LIMITS)
def test_trust_ratio_forgets_the_size_of_gradients(problem: Any, coefficient: float) -> None:
    params, grads = problem
    transform = transforms.scale_by_trust_ratio(coefficient)
    one, _ = transform.update(grads, (), params)
    # A power of two scales every float exactly, and so the norm and its reciprocal.
    other, _ = transform.update({n: g * 4 for n, g in grads.items()}, (), params)
    assert ts.equal(one, other)


@settings(deadline=None)
@given(problems(), st.integers(1, 4))
def test_accumulating_equal_gradients_gives_them_back(problem: Any, k: int) -> None:
    params, grads = problem
    transform = transforms.accumulate_every(k)
    state = transform.init(params)
    for step in range(k):
        out, state = transform.update(grads, state, params, Context(step, weight=3))
        if step < k - 1:
            assert out == {}
    for name, grad in grads.items():
        torch.testing.assert_close(out[name], grad)
    assert out.keys() == grads.keys()
    if k <= 2:  # doubling and halving are exact
        assert ts.equal(out, {n: grads[n] for n in params if n in grads})


@pytest.mark.parametrize("k", [1, 2, 3])
def test_updates_come_on_every_kth_call(k: int) -> None:
    params = {"w": torch.ones(2)}
    transform = transforms.accumulate_every(k)
    state, came = transform.init(params), []
    for step in range(6):
        out, state = transform.update({"w": torch.ones(2)}, state, params, Context(step))
        came.append(bool(out))
    assert came == [(step + 1) % k == 0 for step in range(6)]
