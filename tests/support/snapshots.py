"""Photographs of what a pure function must not change."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree


def tensors_of(value: Any) -> dict[str, Tensor]:
    """Return every tensor of a module (also those kept as plain attributes) or of a pytree."""
    if not isinstance(value, nn.Module):
        flat, _ = _pytree.tree_flatten_with_path(value)
        return {str(path): leaf for path, leaf in flat if isinstance(leaf, Tensor)}
    found: dict[str, Tensor] = {}
    for name, submodule in value.named_modules():
        kept = {**submodule.__dict__, **submodule._parameters, **submodule._buffers}
        kept |= dict(enumerate(getattr(submodule, "_flat_weights", ())))
        found |= {f"{name}.{key}": leaf for key, leaf in kept.items() if isinstance(leaf, Tensor)}
    return found


def photograph(value: Any) -> dict[str, tuple[Any, ...]]:
    """Return identity, version, bits and gradient of each tensor, and the modules' modes."""
    seen: dict[str, tuple[Any, ...]] = {
        path: (id(leaf), leaf._version, leaf.requires_grad, _has_grad(leaf), bits(leaf))
        for path, leaf in tensors_of(value).items()
    }
    if isinstance(value, nn.Module):
        for name, submodule in value.named_modules():
            seen[f"{name} (mode)"] = (submodule.training, sorted(submodule.__dict__))
    return seen


def _has_grad(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.grad is not None


def bits(tensor: Tensor) -> bytes:
    """Return the raw bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def host_rng() -> tuple[Any, ...]:
    """Return the states of the global generators of PyTorch, Python and NumPy."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global one is what is watched)
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), name, keys.tobytes(), rest)


@contextmanager
def untouched(*values: Any) -> Iterator[None]:
    """Assert that the block changes neither ``values`` (modules, pytrees) nor any global RNG."""
    before, rng = [photograph(value) for value in values], host_rng()
    yield
    for value, photo in zip(values, before, strict=True):
        after = photograph(value)
        changed = [k for k in {**photo, **after} if photo.get(k) != after.get(k)]
        assert not changed, f"changed: {changed}"
    assert host_rng() == rng, "a global random generator moved"
