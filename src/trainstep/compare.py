"""Comparing states, exactly: a digest for equality, a diff for what is not equal."""

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainstep import sharded, tree
from trainstep.members import Members
from trainstep.rng import Key
from trainstep.state import TrainState

_EXACT = (bool, int, str, bytes, type(None), torch.dtype, torch.device, Key)
"""Types whose ``repr`` is all there is to a value."""
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
    enter, so that a state and its copy on another device agree. Reads all tensors to the host. Nor does
    it matter whether processes hold tensors in parts (DTensor); all of them must call then.

    Leaves are tensors, NumPy arrays and Python's numbers, strings, bytes and None; a mapping that is no
    dict (a tokenizer's ``BatchEncoding``, say) counts as the dict of its entries.

    Raises:
        TypeError: for any other leaf, with its path.
    """
    total = hashlib.sha256()
    for path, leaf in sorted(_entries(tree_), key=lambda entry: entry[0]):
        total.update(leaf_digest(path, leaf))
    return total.hexdigest()


def leaf_digest(path: str, leaf: Any) -> bytes:
    """Return the SHA-256 of one leaf under its path."""
    if isinstance(leaf, np.ndarray | np.generic):
        array = _exact_array(path, leaf)
        head = f"{path}:numpy {array.dtype}:{array.shape}".encode()
        return hashlib.sha256(head + array.tobytes()).digest()
    if not isinstance(leaf, Tensor):
        return hashlib.sha256(f"{path}={_written(path, leaf)}".encode()).digest()
    head = f"{path}:{leaf.dtype}:{tuple(leaf.shape)}".encode()
    sha = hashlib.sha256(head)
    if leaf.numel():
        data = sharded.whole(leaf.detach()).cpu().resolve_conj().resolve_neg().contiguous()
        data = data.reshape(-1).view(torch.uint8)
        sha.update(data.numpy().data)
    return sha.digest()


def equal(a: Any, b: Any) -> bool:
    """Tell whether two trees have the same leaves under the same paths, bit for bit; see ``digest``."""
    return not diff(a, b)


def diff(a: Any, b: Any) -> list[Difference]:
    """Return every leaf in which two trees differ, as ``(path, what, max_ulp)``.

    ``what`` names the largest absolute and relative difference and the first differing index, or the
    dtypes, shapes or values where those differ. An empty list means equal bits. Leaves are those that
    ``digest`` takes; it raises TypeError for others.
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
        prefix = f"{path}/" if path else ""
        if isinstance(leaf, Mapping):  # one that is no pytree node
            entries += [(prefix + inner, x) for inner, x in _entries(dict(leaf))]
            continue
        if not isinstance(leaf, TrainState):
            _check(path, leaf)
            entries.append((path, leaf))
            continue
        entries += [(prefix + inner, x) for inner, x in tree.leaves_with_paths(leaf)]
        # Static parts of the record count as well.
        entries += [(f"{prefix}step", leaf.step), (f"{prefix}key", leaf.key.bits)]
    return entries


def _compare(path: str, x: Any, y: Any) -> Difference | None:
    if isinstance(x, np.ndarray | np.generic) and isinstance(y, np.ndarray | np.generic):
        return _compare_arrays(path, np.asarray(x), np.asarray(y))
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        same = type(x) is type(y) and _written(path, x) == _written(path, y)
        return None if same else Difference(path, f"{x!r} != {y!r}")
    if x.dtype != y.dtype or x.shape != y.shape:
        return Difference(path, f"{x.dtype} {tuple(x.shape)} != {y.dtype} {tuple(y.shape)}")
    x, y = sharded.whole(x.detach()).cpu(), sharded.whole(y.detach()).cpu()
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


def _compare_arrays(path: str, x: Any, y: Any) -> Difference | None:
    if x.dtype != y.dtype or x.shape != y.shape:
        return Difference(path, f"numpy {x.dtype} {x.shape} != {y.dtype} {y.shape}")
    if x.tobytes() == y.tobytes():
        return None
    rows = [np.frombuffer(a.tobytes(), np.uint8).reshape(*a.shape, a.itemsize) for a in (x, y)]
    different = (rows[0] != rows[1]).any(axis=-1)
    first = tuple(int(i) for i in np.argwhere(different)[0])
    return Difference(path, f"{int(different.sum())} of {x.size} differ, first at {first}")


def _check(path: str, leaf: Any) -> None:
    """Raise TypeError for a leaf whose value is not known to the bit."""
    if isinstance(leaf, np.ndarray | np.generic):
        _exact_array(path, leaf)
    elif not isinstance(leaf, Tensor):
        _written(path, leaf)


def _exact_array(path: str, leaf: Any) -> Any:
    array = np.asarray(leaf)
    if array.dtype.hasobject:
        raise _inexact(path, f"a NumPy array of {array.dtype}")
    return array


def _written(path: str, leaf: Any) -> str:
    """Return a text that values of one type share if and only if they have the same bits."""
    if type(leaf) is float:
        return _written_float(leaf)
    if type(leaf) is complex:
        parts = leaf.real, leaf.imag
        plain = not any(math.isnan(part) for part in parts)
        return repr(leaf) if plain else f"complex({', '.join(map(_written_float, parts))})"
    if type(leaf) is Members:
        return f"Members(values=({', '.join(_written(path, value) for value in leaf.values)}))"
    if type(leaf) in _EXACT or (type(leaf) is tuple and all(type(bits) is int for bits in leaf)):
        return repr(leaf)  # the tuple is that of the keys of a stacked state
    raise _inexact(path, f"a {type(leaf).__module__}.{type(leaf).__qualname__}")


def _written_float(value: float) -> str:
    if not math.isnan(value):
        return repr(value)
    bits = struct.pack(">d", value)
    return "nan" if bits == struct.pack(">d", math.nan) else f"nan:{bits.hex()}"


def _inexact(path: str, what: str) -> TypeError:
    return TypeError(
        f"digest, equal and diff: {path or 'the tree'} is {what}, which has no bits to compare; leaves "
        "must be tensors, NumPy arrays of numbers or text, or Python's numbers, strings, bytes and None. "
        "Of a module, pass dict(module.state_dict())."
    )


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
