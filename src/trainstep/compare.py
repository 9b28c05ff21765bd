"""Comparing states, exactly: a digest for equality, a diff for what is not equal."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainstep import tree
from trainstep.state import TrainState

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """One leaf in which two trees differ.

    Attributes:
        path: where, as ``params/layer.weight``.
        what: what differs, in words.
        max_ulp: largest distance in units in the last place; None if it is not a matter of value.
    """

    path: str
    what: str
    max_ulp: int | None = None


def digest(tree_: Any) -> str:
    """Return a SHA-256 over every leaf's path, dtype, shape and bits, in hexadecimal.

    Equal digests mean equal bits: NaNs count by their payload, zeros by their sign. The device does not
    enter, so that a state and its copy on another device agree. Reads all tensors to the host.
    """
    total = hashlib.sha256()
    for path, leaf in sorted(_entries(tree_), key=lambda entry: entry[0]):
        total.update(leaf_digest(path, leaf))
    return total.hexdigest()


def leaf_digest(path: str, leaf: Any) -> bytes:
    """Return the SHA-256 of one leaf under its path."""
    if not isinstance(leaf, Tensor):
        return hashlib.sha256(f"{path}={leaf!r}".encode()).digest()
    head = f"{path}:{leaf.dtype}:{tuple(leaf.shape)}".encode()
    sha = hashlib.sha256(head)
    if leaf.numel():
        data = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = data.reshape(-1).view(torch.uint8)
        sha.update(data.numpy().data)
    return sha.digest()


def equal(a: Any, b: Any) -> bool:
    """Tell whether two trees have the same leaves under the same paths, bit for bit."""
    return not diff(a, b)


def diff(a: Any, b: Any) -> list[Difference]:
    """Return every leaf in which two trees differ, as ``(path, what, max_ulp)``.

    ``what`` names the largest absolute and relative difference and the first differing index, or the
    dtypes, shapes or values where those differ. An empty list means equal bits.
    """
    left, right = dict(_entries(a)), dict(_entries(b))
    found = [Difference(path, "only in the first") for path in left if path not in right]
    found += [Difference(path, "only in the second") for path in right if path not in left]
    for path, x in left.items():
        if path in right:
            difference = _compare(path, x, right[path])
            if difference is not None:
                found.append(difference)
    return found


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return how many representable numbers lie between ``a`` and ``b``, elementwise, as int64.

    Signs are taken into account: -0.0 and 0.0 are 0 apart. NaNs are as far apart as can be, unless
    their bits are equal.
    """
    if not a.dtype.is_floating_point:
        return (a.to(torch.int64) - b.to(torch.int64)).abs()
    low, high = torch.aminmax(torch.stack([_ordered(a), _ordered(b)]), dim=0)
    most = torch.iinfo(torch.int64).max
    distance = torch.where(high - low < 0, most, high - low)  # float64 of unlike signs can wrap
    nan = a.isnan() | b.isnan()
    return torch.where(nan & ~_same_bits(a, b), most, distance)


def _entries(value: Any) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for path, leaf in tree.leaves_with_paths(value, lambda node: isinstance(node, TrainState)):
        if not isinstance(leaf, TrainState):
            entries.append((path, leaf))
            continue
        prefix = f"{path}/" if path else ""
        entries += [(prefix + inner, x) for inner, x in tree.leaves_with_paths(leaf)]
        # Static parts of the record count as well.
        entries += [(f"{prefix}step", leaf.step), (f"{prefix}key", leaf.key.bits)]
    return entries


def _compare(path: str, x: Any, y: Any) -> Difference | None:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        same = type(x) is type(y) and bool(x == y)
        return None if same else Difference(path, f"{x!r} != {y!r}")
    if x.dtype != y.dtype or x.shape != y.shape:
        return Difference(path, f"{x.dtype} {tuple(x.shape)} != {y.dtype} {tuple(y.shape)}")
    x, y = x.detach().cpu(), y.detach().cpu()
    different = ~_same_bits(x, y)
    if not bool(different.any()):
        return None
    first = tuple(int(i) for i in different.nonzero()[0])
    if x.dtype.is_complex:
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    u, v = x.double(), y.double()
    gap = (u - v).abs()
    scale = torch.maximum(u.abs(), v.abs()).clamp_min(torch.finfo(torch.float64).tiny)
    what = (
        f"{int(different.sum())} of {different.numel()} differ, first at {first}; "
        f"max abs {gap.max().item():.3g}, max rel {(gap / scale).max().item():.3g}"
    )
    return Difference(path, what, int(ulp_distance(x, y).max()))


def _same_bits(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype.is_complex:
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
        return _same_bits(x, y).all(dim=-1)
    if not x.dtype.is_floating_point:
        return x == y
    kind = _INTEGER[x.element_size()]
    return x.contiguous().view(kind) == y.contiguous().view(kind)


def _ordered(x: Tensor) -> Tensor:
    """Map floats to integers so that neighbouring floats are neighbouring integers."""
    bits = x.contiguous().view(_INTEGER[x.element_size()]).to(torch.int64)
    low = -(2 ** (8 * x.element_size() - 1))
    return torch.where(bits < 0, low - bits, bits)
