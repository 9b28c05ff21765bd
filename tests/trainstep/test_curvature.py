"""Hessian-vector products and the gradient noise scale."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainstep as ts
from support import models
from support.snapshots import untouched
from trainstep.curvature import gradient_noise_scale, hvp, microbatch_norms

KEY = ts.rng.key(3)
D = torch.float64


def setup(module: nn.Module | str) -> tuple[Any, ts.types.Params, ts.types.Buffers]:
    module = models.build(module, D) if isinstance(module, str) else module.to(D)
    _, params, buffers = ts.functionalize(module)
    return ts.module_loss(module, models.mean_loss), params, buffers


def vector_like(params: ts.types.Params, seed: int = 0) -> ts.types.Params:
    gen = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=gen, dtype=D) for n, p in params.items()}


class Attention(nn.Module):
    """Attention over the two halves of ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(2, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 1, 2, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))


@pytest.mark.parametrize(
    "name",
    ["mlp", "frozen", "tied", "gru", "dropout", "custom_function", "checkpointed", "attention"],
)
def test_hvp_equals_that_of_torch_autograd(name: str) -> None:
    loss_fn, params, buffers = setup(Attention() if name == "attention" else name)
    params = {n: 1.5 * p for n, p in params.items()}  # not those that the module holds itself
    batch, vector = models.batch(dtype=D), vector_like(params)
    with untouched(loss_fn.apply.module, params, buffers, batch, vector):
        product = hvp(loss_fn)(params, buffers, batch, KEY, vector)

    def value(*leaves: Tensor) -> Tensor:
        given = dict(zip(params, leaves, strict=True))
        return loss_fn(given, buffers, batch, KEY.fold_in(0)).value

    if name == "checkpointed":  # runs its forward again, so the plain model of the same weights
        plain = models.Checkpointed(recompute=False).to(D)
        loss_fn = ts.module_loss(plain, models.mean_loss)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.autograd.functional.hvp(
            value, tuple(params.values()), tuple(vector.values())
        )
    for key, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(product[key], wanted, rtol=1e-10, atol=1e-12)
        assert not product[key].requires_grad


def test_hvp_of_a_quadratic_is_the_matrix_times_the_vector() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=D)

    def loss(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        w = params["w"]
        return ts.Loss(batch * w @ matrix @ w / 2 + params["linear"].sum(), weight=4)

    params = {"w": torch.ones(2, dtype=D), "linear": torch.ones(3, dtype=D)}
    params["idle"] = torch.ones(1, dtype=D)
    vector = {"w": torch.tensor([1.0, -1.0], dtype=D), "linear": torch.ones(3, dtype=D)}
    vector["idle"] = torch.ones(1, dtype=D)
    product = hvp(loss)(params, {}, torch.tensor(4.0, dtype=D), KEY, vector)
    assert product["w"].tolist() == [1.0, -3.0]  # the mean divides by the weight of 4
    assert product["linear"].tolist() == [0.0, 0.0, 0.0]
    assert product["idle"].tolist() == [0.0]


def test_hvp_of_a_linear_loss_is_zero() -> None:
    def loss(params: Any, buffers: Any, batch: Any, key: ts.Key) -> ts.Loss:
        return ts.Loss(params["w"].sum())

    ones = {"w": torch.ones(2)}
    assert hvp(loss)(ones, {}, None, KEY, ones)["w"].tolist() == [0.0, 0.0]


def test_hvp_is_linear_and_symmetric() -> None:
    loss_fn, params, buffers = setup("dropout")
    batch, u, v = models.batch(dtype=D), vector_like(params, 1), vector_like(params, 2)

    def product(w: ts.types.Params) -> ts.types.Params:
        return hvp(loss_fn)(params, buffers, batch, KEY, w)

    def dot(a: ts.types.Params, b: ts.types.Params) -> Tensor:
        return sum((a[n] * b[n]).sum() for n in a)  # type: ignore[return-value]

    torch.testing.assert_close(dot(u, product(v)), dot(v, product(u)))
    both = product({n: 2 * u[n] + v[n] for n in u})
    for name, wanted in product(u).items():
        torch.testing.assert_close(both[name], 2 * wanted + product(v)[name])


def test_hvp_refuses_vectors_that_do_not_fit() -> None:
    loss_fn, params, buffers = setup("mlp")
    vector = {**vector_like(params), "other": torch.ones(1)}
    vector["0.bias"] = torch.ones(2)
    del vector["2.bias"]
    with pytest.raises(
        ValueError, match=r"missing: 2\.bias; unexpected: other; 0\.bias has shape"
    ) as e:
        hvp(loss_fn)(params, buffers, models.batch(dtype=D), KEY, vector)
    assert "(2,), expected (6,)" in str(e.value)


def test_hvp_refuses_a_loss_without_parameters() -> None:
    def loss(params: Any, buffers: Any, batch: Any, key: ts.Key) -> ts.Loss:
        return ts.Loss(torch.ones(()))

    ones = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="hvp: the loss does not depend on any trainable"):
        hvp(loss)(ones, {}, None, KEY, ones)


def test_noise_scale_solves_its_two_equations() -> None:
    signal, noise, small, big = 3.0, 50.0, 4, 32
    found = gradient_noise_scale(
        torch.tensor([signal + noise / small], dtype=D).sqrt(),
        torch.tensor([signal + noise / big], dtype=D).sqrt(),
        small,
        big,
    )
    torch.testing.assert_close(found.signal, torch.tensor(signal, dtype=D))
    torch.testing.assert_close(found.noise, torch.tensor(noise, dtype=D))
    torch.testing.assert_close(found.scale, torch.tensor(noise / signal, dtype=D))


def test_squares_are_averaged_before_they_are_divided() -> None:
    small, big = [[3.0, 4.0], [5.0, 6.0]], [2.0, 3.0]
    found = gradient_noise_scale(torch.tensor(small), torch.tensor(big), 1, 2)
    assert found.signal == 2 * 6.5 - 21.5
    assert found.noise == (21.5 - 6.5) / 0.5
    assert gradient_noise_scale([3.0, 4.0, 5.0, 6.0], big, 1, 2).scale == found.scale
    tensors = [torch.tensor(v) for v in big]
    assert (
        gradient_noise_scale([3.0, 4.0, 5.0, 6.0], tensors, torch.tensor(1), 2.0).scale
        == found.scale
    )


def linear_loss(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
    """A loss whose gradient for a sample is the sample."""
    return ts.Loss((params["w"] * batch).sum(), weight=len(batch))


def test_noise_scale_of_gaussian_gradients_is_that_of_the_distribution() -> None:
    gen = torch.Generator().manual_seed(0)
    mean, sigma, dims, steps, parts, size = 0.5, 2.0, 20, 200, 8, 4
    params, small, big = {"w": torch.zeros(dims, dtype=D)}, [], []
    for _ in range(steps):
        items = mean + sigma * torch.randn(parts * size, dims, generator=gen, dtype=D)
        norms = microbatch_norms(linear_loss)(params, {}, items.split(size), KEY)
        small.append(norms[0])
        big.append(norms[1])
    found = gradient_noise_scale(torch.stack(small), torch.stack(big), size, parts * size)
    torch.testing.assert_close(found.noise.item(), sigma**2 * dims, rtol=0.05, atol=0)
    torch.testing.assert_close(found.signal.item(), mean**2 * dims, rtol=0.05, atol=0)
    torch.testing.assert_close(found.scale.item(), sigma**2 / mean**2, rtol=0.07, atol=0)


def test_microbatch_norms_are_those_of_the_gradients() -> None:
    loss_fn, params, buffers = setup("dropout")
    parts = models.batches(3, dtype=D)
    with untouched(params, buffers, parts):
        small, big = microbatch_norms(loss_fn)(params, buffers, parts, KEY)
    total = ts.grads.Accumulator(loss_fn, params, buffers, KEY)
    for i, part in enumerate(parts):
        total.add(part, i)
        torch.testing.assert_close(small[i], ts.tree.global_norm(total.take().mean()[1].values()))
    _, grads = ts.accumulate(loss_fn, params, buffers, parts, KEY)
    torch.testing.assert_close(big, ts.tree.global_norm(grads.values()))
    assert small.shape == (3,)
    assert big.shape == ()


def test_microbatch_norms_divide_by_tensor_weights() -> None:
    def loss(params: Any, buffers: Any, batch: Tensor, key: ts.Key) -> ts.Loss:
        return ts.Loss((params["w"] * batch).sum(), weight=torch.tensor(2))

    parts = [torch.tensor([6.0, 8.0]), torch.tensor([0.0, 2.0])]
    small, big = microbatch_norms(loss)({"w": torch.ones(2)}, {}, parts, KEY)
    assert small.tolist() == [5.0, 1.0]
    torch.testing.assert_close(big, torch.tensor([1.5, 2.5]).norm())


@pytest.mark.parametrize("count", [0, 1])
def test_one_norm_says_nothing_about_noise(count: int) -> None:
    parts = [torch.ones(1, 2)] * count
    with pytest.raises(ValueError, match=f"at least two micro-batches, got {count}"):
        microbatch_norms(linear_loss)({"w": torch.ones(2)}, {}, parts, KEY)


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (0, 4)])
def test_noise_scale_refuses_sizes_out_of_order(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 < small_size < big_size, got"):
        gradient_noise_scale([1.0], [1.0], *sizes)


def test_noise_scale_refuses_empty_norms() -> None:
    with pytest.raises(ValueError, match="gradient_noise_scale: big_norms is empty"):
        gradient_noise_scale([1.0], [], 1, 2)
