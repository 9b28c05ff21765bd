"""Gradients of every sample of a batch, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainstep import rng, tree
from trainstep.member_grads import (
    Randomness,
    check_randomness,
    explained,
)
from trainstep.rng import Key
from trainstep.types import Buffers, Grads, LossFn, Params

_INSTEAD = (
    "Where running statistics are the reason, use evaluation mode: "
    "functools.partial(loss_fn, train=False). "
    "Otherwise take the gradients of single samples in a loop: value_and_grad(loss_fn)."
)


def per_sample_grads(
    loss_fn: LossFn, *, randomness: Randomness = "different", chunk_size: int | None = None
) -> Callable[[Params, Buffers, Any, Key], Grads]:
    """Make ``fn(params, buffers, batch, key) -> grads``: one gradient per sample, stacked.

    Entry ``i`` is the gradient of the loss of the batch that consists of sample ``i`` alone (its leading
    axis has length 1), up to rounding: what ``value_and_grad(loss_fn)`` gives for it. Leaves of the batch
    without a leading axis go to every sample. Parameters that the loss does not reach have zeros.

    With dropout, each sample draws its own mask, from one stream seeded by the key; a loop over samples
    would use the same numbers for each, which ``randomness="same"`` does. Buffers that training changes,
    such as BatchNorm's statistics, have no meaning for samples that are taken apart: PyTorch raises. Use
    evaluation mode: ``per_sample_grads(functools.partial(loss_fn, train=False))``. Attention runs as plain
    matrix products.

    Args:
        loss_fn: ``loss_fn(params, buffers, batch, key) -> Loss``.
        randomness: ``"different"`` draws for each sample, ``"same"`` for all, or ``"error"``.
        chunk_size: how many samples at a time; None for all. Bounds the memory of activations.

    Returns:
        A function whose result has a gradient of shape (samples, \\*parameter's) for every parameter.

    Raises:
        ValueError: for an unknown choice; from the function, for tensors of different leading axes.
    """
    check_randomness("per_sample_grads", randomness)

    def per_sample(params: Params, buffers: Buffers, batch: Any, key: Key) -> Grads:
        leaves, spec = tree.flatten(batch)
        split = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
        _check_leading([leaves[i] for i in split])
        key = key.fold_in(0)  # that of the first micro-batch, as in value_and_grad

        def value(given: Params, samples: list[Tensor]) -> Tensor:
            mine = list(leaves)
            for place, sample in zip(split, samples, strict=True):
                mine[place] = sample.unsqueeze(0)
            return loss_fn(given, buffers, tree.unflatten(mine, spec), key).value

        gradient = torch.func.grad(value)
        vectorized = torch.func.vmap(
            gradient, in_dims=(None, 0), randomness=randomness, chunk_size=chunk_size
        )
        devices = {p.device for p in params.values()}
        given = {name: param.detach() for name, param in params.items()}
        with (
            explained("per_sample_grads", _INSTEAD),
            rng.seeded(key, devices),
            sdpa_kernel(SDPBackend.MATH),  # the others' backward passes have no batching rule
        ):
            grads: Grads = vectorized(given, [leaves[i] for i in split])
        return grads

    return per_sample


def _check_leading(tensors: list[Tensor]) -> None:
    lengths = sorted({tensor.shape[0] for tensor in tensors})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            "per_sample_grads: every tensor of the batch needs the same leading axis, one entry per "
            f"sample; got lengths {', '.join(map(str, lengths)) or 'of no tensors'}"
        )
