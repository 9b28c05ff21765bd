"""Each gradient transformation against the formula or the function that it is to equal."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from trainstep import transforms
from trainstep.transforms import Context, Transform

NAMES = {"weight": (5, 3), "kernel": (2, 3, 2, 2), "bias": (4,), "gain": ()}


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in NAMES.items()}


PARAMS, GRADS = draw(0), draw(1)

ZOO = [
    transforms.identity(),
    transforms.clip_by_global_norm(0.5),
    transforms.clip_by_value(0.3),
    transforms.clip_by_parameter_norm(0.5),
    transforms.adaptive_clip(0.1),
    transforms.add_noise(0.1),
    transforms.centralize(),
    transforms.zero_nonfinite(),
    transforms.scale_by_trust_ratio(0.1),
    transforms.accumulate_every(2),
    transforms.chain(transforms.centralize(), transforms.accumulate_every(2)),
]


def apply(
    transform: Transform, grads: dict[str, Tensor] = GRADS, context: Context | None = None
) -> dict[str, Tensor]:
    return transform.update(grads, transform.init(PARAMS), PARAMS, context)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transform", ZOO, ids=lambda t: t.name)
def test_pure_and_equal_when_owned(transform: Transform, dtype: torch.dtype) -> None:
    params, grads = draw(0, dtype), draw(1, dtype)
    state = transform.init(params)
    before = ts.digest((params, grads, state)), torch.random.get_rng_state()
    context = {"step": 1, "key": ts.Key(7)}
    first = transform.update(grads, state, params, Context(**context))
    second = transform.update(grads, state, params, Context(**context))
    assert ts.digest((params, grads, state)) == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert ts.equal(first, second)
    owned = Context(**context, owned=True, donated=True)
    third = transform.update(ts.tree.clone(grads), ts.tree.clone(state), params, owned)
    assert ts.equal(first, third)
    assert {n: g.dtype for n, g in first[0].items()} == {n: g.dtype for n, g in grads.items()}


@pytest.mark.parametrize("limit", [0.05, 0.3, 100.0])
def test_clips_have_the_bits_of_torch(limit: float) -> None:
    def leaves() -> dict[str, nn.Parameter]:
        made = {n: nn.Parameter(p.clone()) for n, p in PARAMS.items()}
        for name, leaf in made.items():
            leaf.grad = GRADS[name].clone()
        return made

    whole, single, value = leaves(), leaves(), leaves()
    nn.utils.clip_grad_norm_(list(whole.values()), limit)
    for leaf in single.values():
        nn.utils.clip_grad_norm_([leaf], limit)
    nn.utils.clip_grad_value_(list(value.values()), limit)
    for made, transform in (
        (whole, transforms.clip_by_global_norm(limit)),
        (single, transforms.clip_by_parameter_norm(limit)),
        (value, transforms.clip_by_value(limit)),
    ):
        assert ts.equal(apply(transform), {n: leaf.grad for n, leaf in made.items()})


def test_adaptive_clip_limits_each_row_by_its_weights() -> None:
    clipped = apply(transforms.adaptive_clip(0.1))
    for name, grad in clipped.items():
        rows = zip(grad, GRADS[name], PARAMS[name], strict=True) if grad.ndim > 1 else []
        for after, before, param in rows or [(grad, GRADS[name], PARAMS[name])]:
            limit = 0.1 * max(param.norm().item(), 1e-3)
            factor = min(1.0, limit / before.norm().item())
            torch.testing.assert_close(after, before * factor)
    roomy = apply(transforms.adaptive_clip(1e6))
    assert ts.equal(roomy, GRADS)


def test_adaptive_clip_lets_zero_weights_move_and_leaves_zero_gradients() -> None:
    transform = transforms.adaptive_clip(0.5, eps=0.01)
    zeros = {"w": torch.zeros(2, 2)}
    grads, _ = transform.update({"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}, (), zeros)
    torch.testing.assert_close(grads["w"], torch.tensor([[0.003, 0.004], [0.0, 0.0]]))


def test_noise_fades_with_the_step_and_follows_the_key() -> None:
    params = {"w": torch.zeros(200, 200)}

    def noise(step: int, key: int, seed: int = 0) -> Tensor:
        transform = transforms.add_noise(0.04, 0.5, seed=seed)
        return transform.update(params, (), params, Context(step, ts.Key(key)))[0]["w"]

    assert noise(0, 1).std().item() == pytest.approx(0.2, rel=0.02)
    assert noise(99, 1).std().item() == pytest.approx(0.2 / math.sqrt(10), rel=0.02)
    assert noise(0, 1).mean().item() == pytest.approx(0.0, abs=0.01)
    assert torch.equal(noise(3, 1), noise(3, 1))
    assert not torch.equal(noise(3, 1), noise(3, 2))
    assert not torch.equal(noise(3, 1), noise(3, 1, seed=1))


def test_centralized_rows_have_no_mean() -> None:
    centred = apply(transforms.centralize())
    for name, grad in centred.items():
        if grad.ndim > 1:
            mean = GRADS[name].flatten(1).mean(dim=1)
            expected = GRADS[name].flatten(1) - mean[:, None]
            torch.testing.assert_close(grad.flatten(1), expected)
        else:
            assert torch.equal(grad, GRADS[name])


def test_zero_nonfinite_keeps_the_rest() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -2.0, -0.0])
    cleaned = apply(transforms.zero_nonfinite(), {"bias": odd})
    assert ts.equal(cleaned, {"bias": torch.tensor([0.0, 0.0, 0.0, 1e38, -2.0, -0.0])})


def test_trust_ratio_gives_gradients_the_size_of_their_parameters() -> None:
    scaled = apply(transforms.scale_by_trust_ratio(0.02))
    for name, grad in scaled.items():
        assert grad.norm().item() == pytest.approx(0.02 * PARAMS[name].norm().item(), rel=1e-5)
    transform = transforms.scale_by_trust_ratio(0.02)
    ones, zeros = {"w": torch.ones(3)}, {"w": torch.zeros(3)}
    assert ts.equal(transform.update(ones, (), zeros)[0], ones)
    assert ts.equal(transform.update(zeros, (), ones)[0], zeros)


def test_parameters_without_a_gradient_stay_without() -> None:
    for transform in ZOO:
        if "accumulate" not in transform.name:
            assert apply(transform, {"bias": GRADS["bias"]}).keys() == {"bias"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transforms.clip_by_value(0), "clip_by_value: limit must be above 0: 0"),
        (lambda: transforms.clip_by_parameter_norm(-1), "max_norm must be above 0: -1"),
        (lambda: transforms.adaptive_clip(math.nan), "clipping must be above 0: nan"),
        (lambda: transforms.adaptive_clip(eps=0), "eps must be above 0: 0"),
        (lambda: transforms.add_noise(-1), "eta must be at least 0: -1"),
        (lambda: transforms.scale_by_trust_ratio(0), "coefficient must be above 0: 0"),
        (lambda: transforms.scale_by_trust_ratio(eps=-1), "eps must be at least 0: -1"),
        (lambda: transforms.accumulate_every(0), "k must be an int of at least 1: 0"),
        (lambda: transforms.accumulate_every(1.5), "k must be an int of at least 1: 1.5"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_period_says_how_often_the_host_does_the_same() -> None:
    chain, every = transforms.chain, transforms.accumulate_every
    assert chain(transforms.centralize(), transforms.clip_by_value(1.0)).period == 1
    assert chain(every(2), chain(every(3), transforms.identity())).period == 6
    assert chain(every(2), transforms.add_noise()).period is None


def test_later_transforms_run_only_on_the_calls_that_update() -> None:
    ran = []

    def spy(grads: Any, state: Any, params: Any, context: Context) -> Any:
        ran.append(context.step)
        return grads, state

    later = transforms.chain(transforms.accumulate_every(3), Transform("spy", spy))
    state = later.init(PARAMS)
    for index in range(7):
        _, state = later.update(GRADS, state, PARAMS, Context(index))
    assert ran == [2, 5]


# accumulate_every in a step ---------------------------------------------------------------------


class Net(nn.Module):
    """Dropout-free, with a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def mse(call: Any, batch: Any) -> Tensor:
    return (call(batch["x"]) - batch["y"]).square().mean()


def batch_of(n: int, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, 4, generator=generator),
        "y": torch.randn(n, 2, generator=generator),
    }


def part(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


OPTIMIZER = ts.optim.adamw(lr=0.01, weight_decay=0.1)


def test_accumulated_calls_equal_one_call_with_micro_batches() -> None:
    model, batch = net(), batch_of(12)
    clip = transforms.clip_by_global_norm(0.1)
    loss = ts.module_loss(model, mse)
    whole = ts.make_step(loss, OPTIMIZER, transforms=(clip,), microbatches=3)
    parts = ts.make_step(loss, OPTIMIZER, transforms=(transforms.accumulate_every(3), clip))
    expected = whole.init(model)
    state = parts.init(model)
    for _ in range(2):
        expected, _ = whole(expected, batch)
        for start in (0, 4, 8):
            state, _ = parts(state, part(batch, start, start + 4))
    assert ts.equal(state.params, expected.params)
    assert ts.equal(state.opt_state, expected.opt_state)


@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip"])
@pytest.mark.parametrize("donated", [False, True])
def test_nothing_moves_between_updates(donated: bool, on_nonfinite: Any) -> None:
    model = net()
    every = (transforms.accumulate_every(3), transforms.add_noise())
    loss = ts.module_loss(model, mse)
    step = ts.make_step(loss, OPTIMIZER, transforms=every, on_nonfinite=on_nonfinite)
    if donated:
        step = ts.donate(step)
    state = step.init(model)
    moved = []
    for index in range(7):
        before = ts.digest((state.params, state.opt_state))
        state, _ = step(state, batch_of(4, index))
        moved.append(ts.digest((state.params, state.opt_state)) != before)
    assert moved == [False, False, True, False, False, True, False]
    assert state.step == 7


def test_batches_of_unequal_size_count_by_their_items() -> None:
    model, batch = net(), batch_of(10)
    loss = ts.module_loss(model, mse)
    sgd = ts.optim.sgd(lr=0.1)
    step = ts.make_step(loss, sgd, transforms=(transforms.accumulate_every(2),))
    state = step.init(model)
    for start, stop in ((0, 7), (7, 10)):
        state, _ = step(state, part(batch, start, stop))
    whole = ts.make_step(loss, sgd)
    expected, _ = whole(whole.init(model), batch)
    for name, param in expected.params.items():
        torch.testing.assert_close(state.params[name], param, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_nothing_reaches_is_left_alone() -> None:
    model = net()
    step = ts.make_step(
        ts.module_loss(model, mse), OPTIMIZER, transforms=(transforms.accumulate_every(2),)
    )
    first = state = step.init(model)
    for index in range(2):
        state, _ = step(state, batch_of(4, index))
    assert torch.equal(state.params["unused.weight"], first.params["unused.weight"])
    assert not torch.equal(state.params["body.0.weight"], first.params["body.0.weight"])


def test_a_skipped_call_drops_out_of_the_mean() -> None:
    model = net()
    loss = ts.module_loss(model, mse)
    sgd = ts.optim.sgd(lr=0.1)
    step = ts.make_step(
        loss, sgd, transforms=(transforms.accumulate_every(2),), on_nonfinite="skip"
    )
    bad = {name: tensor * math.nan for name, tensor in batch_of(4).items()}
    good = batch_of(4, 8)
    whole = ts.make_step(loss, sgd)
    expected, _ = whole(whole.init(model), good)
    for pair in ((bad, good), (good, bad, good, good)):
        state = step.init(model)
        for batch in pair:
            state, _ = step(state, batch)
        assert int(state.extras["skipped"]) == 1
        for name, param in expected.params.items():
            torch.testing.assert_close(state.params[name], param)


def test_a_run_goes_on_from_the_middle_of_an_accumulation() -> None:
    model = net()
    step = ts.make_step(
        ts.module_loss(model, mse), OPTIMIZER, transforms=(transforms.accumulate_every(3),)
    )
    state = step.init(model)
    for index in range(4):
        state, _ = step(state, batch_of(4, index))
    restored = ts.serialize.from_flat(*ts.serialize.to_flat(state))
    for index in range(4, 6):
        state, _ = step(state, batch_of(4, index))
        restored, _ = step(restored, batch_of(4, index))
    assert ts.equal(state, restored)


def test_a_state_without_memory_gets_it_on_the_first_step() -> None:
    model = net()
    step = ts.make_step(
        ts.module_loss(model, mse),
        OPTIMIZER,
        transforms=(transforms.accumulate_every(2),),
        on_nonfinite="skip",
    )
    bare, full = ts.init(model, OPTIMIZER), step.init(model)
    for index in range(4):
        bare, _ = step(bare, batch_of(4, index))
        full, _ = step(full, batch_of(4, index))
    assert ts.equal(bare, full)
