"""What a loss looks like around a point: Hessian-vector products, and how noisy its gradients are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainstep import rng, tree
from trainstep.grads import Accumulator
from trainstep.model import held
from trainstep.rng import Key
from trainstep.types import Buffers, Grads, LossFn, Params


def hvp(loss_fn: LossFn) -> Callable[[Params, Buffers, Any, Key, Params], Params]:
    """Make ``fn(params, buffers, batch, key, vector) -> H @ vector``, H the Hessian of the mean loss.

    The gradient is differentiated once more, in reverse (Pearlmutter, 1994, has the identity
    ``H v = d(g . v)/dw``), so the Hessian is never formed: time and memory are a small multiple of a
    gradient's. Random numbers in the loss are those that ``value_and_grad(loss_fn)`` uses with the same
    key. ``scaled_dot_product_attention`` runs as plain matrix products, because the fused kernels can be
    differentiated only once.

    Args:
        loss_fn: ``loss_fn(params, buffers, batch, key) -> Loss``, twice differentiable.

    Returns:
        A pure function. ``vector`` has a tensor for every parameter, of its shape; so has the result, with
        zeros where the gradient does not depend on a parameter.

    Raises:
        ValueError: from the function, if ``vector`` does not fit the parameters, or the loss depends on
            none of them.
    """

    def product(params: Params, buffers: Buffers, batch: Any, key: Key, vector: Params) -> Params:
        _check_vector(params, vector)
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        devices = {param.device for param in params.values()}
        key = key.fold_in(0)  # that of the first micro-batch
        with held(), rng.seeded(key, devices), sdpa_kernel(SDPBackend.MATH):
            value = loss_fn(leaves, buffers, batch, key).value
            if not value.requires_grad:
                raise ValueError("hvp: the loss does not depend on any trainable parameter")
            return _second(value, leaves, vector)

    return product


def _second(value: Tensor, leaves: Params, vector: Params) -> Params:
    """Differentiate the product of ``value``'s gradient and ``vector``."""
    inputs = list(leaves.values())
    grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    pairs = [
        (grad, vector[name].detach())
        for name, grad in zip(leaves, grads, strict=True)
        if grad is not None and grad.requires_grad
    ]
    seconds: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        firsts, weights = zip(*pairs, strict=True)
        seconds = torch.autograd.grad(firsts, inputs, grad_outputs=weights, allow_unused=True)
    return {
        name: torch.zeros_like(leaf, requires_grad=False) if second is None else second
        for (name, leaf), second in zip(leaves.items(), seconds, strict=True)
    }


@frozen(eq=False)
class NoiseScale:
    """The noise of gradients and what it is measured against; see ``gradient_noise_scale``.

    Attributes:
        noise: estimate of ``tr(Σ)``, the variance of a single item's gradient, summed over parameters.
        signal: estimate of ``|G|²``, the squared norm of the expected gradient.
    """

    noise: Tensor
    signal: Tensor

    @property
    def scale(self) -> Tensor:
        """The simple noise scale ``tr(Σ) / |G|²``: a batch size, in items."""
        return self.noise / self.signal


def gradient_noise_scale(
    small_norms: Tensor | Sequence[Tensor] | Sequence[float],
    big_norms: Tensor | Sequence[Tensor] | Sequence[float],
    small_size: Tensor | float,
    big_size: Tensor | float,
) -> NoiseScale:
    """Estimate the gradient noise scale from gradient norms at two batch sizes.

    The squared norm of a gradient over ``B`` items has the expectation ``|G|² + tr(Σ) / B`` (McCandlish
    et al., 2018, arXiv:1812.06162, appendix A.1). Two batch sizes give two equations, with the unbiased
    solutions ::

        signal = (B_big * |g_big|² - B_small * |g_small|²) / (B_big - B_small)
        noise  = (|g_small|² - |g_big|²) / (1 / B_small - 1 / B_big)

    Batches much larger than ``noise / signal`` gain little from growing, much smaller ones lose little by
    averaging. Both are noisy and may be negative; their ratio is biased. So give the norms of many steps
    at once: squares are averaged first, and divided last.

    Args:
        small_norms: norms of gradients of small batches, any shape.
        big_norms: norms of gradients of big batches, any shape.
        small_size: items in a small batch.
        big_size: items in a big batch.

    Returns:
        Noise and signal as zero-dimensional tensors on the device of the norms; nothing is read.

    Raises:
        ValueError: if a norm is missing, or the sizes are numbers and not ``0 < small_size < big_size``.
    """
    small, big = _mean_square("small_norms", small_norms), _mean_square("big_norms", big_norms)
    numbers = not isinstance(small_size, Tensor) and not isinstance(big_size, Tensor)
    if numbers and not 0 < small_size < big_size:
        raise ValueError(
            "gradient_noise_scale: sizes must be 0 < small_size < big_size, got "
            f"{small_size} and {big_size}"
        )
    signal = (big_size * big - small_size * small) / (big_size - small_size)
    noise = (small - big) / (1 / small_size - 1 / big_size)
    return NoiseScale(noise, signal)


def microbatch_norms(
    loss_fn: LossFn,
) -> Callable[[Params, Buffers, Iterable[Any], Key], tuple[Tensor, Tensor]]:
    """Make ``fn(params, buffers, microbatches, key) -> (small_norms, big_norm)``.

    These are what ``gradient_noise_scale`` takes: the norms of the gradient of every micro-batch, shape
    (micro-batches,), and that of the gradient of all of them, zero-dimensional. One pass over the
    micro-batches gives both; gradients are those of the means, as in ``accumulate``. The estimate needs
    micro-batches of equal weight. Buffers go from one micro-batch to the next, and are not returned.

    Raises:
        ValueError: from the function, for fewer than two micro-batches.
    """

    def norms(
        params: Params, buffers: Buffers, microbatches: Iterable[Any], key: Key
    ) -> tuple[Tensor, Tensor]:
        total = Accumulator(loss_fn, params, buffers, key, unit=1.0)
        sums, small = None, []
        for batch in microbatches:
            total.add(batch)
            part = total.take()
            small.append(tree.global_norm(part.grads.values()) / part.weight)
            sums = part if sums is None else sums.add_(part)
        if sums is None or len(small) < 2:
            raise ValueError(
                f"microbatch_norms: expected at least two micro-batches, got {len(small)}; one norm says "
                "nothing about noise"
            )
        grads: Grads = sums.mean()[1]
        return torch.stack(small), tree.global_norm(grads.values())

    return norms


def _mean_square(what: str, norms: Tensor | Sequence[Tensor] | Sequence[float]) -> Tensor:
    if not isinstance(norms, Tensor):
        tensors = [torch.as_tensor(norm) for norm in norms]
        norms = torch.stack(tensors) if tensors else torch.empty(0)
    if not norms.numel():
        raise ValueError(f"gradient_noise_scale: {what} is empty")
    # In float64: signal and noise are differences of nearly equal numbers.
    return norms.double().square().mean()


def _check_vector(params: Params, vector: Params) -> None:
    problems = [f"missing: {name}" for name in params if name not in vector]
    problems += [f"unexpected: {name}" for name in vector if name not in params]
    problems += [
        f"{name} has shape {tuple(vector[name].shape)}, expected {tuple(param.shape)}"
        for name, param in params.items()
        if name in vector and vector[name].shape != param.shape
    ]
    if problems:
        raise ValueError(
            "hvp: the vector needs a tensor for every parameter, of its shape; "
            + "; ".join(problems)
        )
