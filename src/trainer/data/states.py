"""States of datasets as JSON: what they may hold, and how it is written."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A mapping with one of these keys stands for a value that JSON does not have.
_MARK = "$"


def stateful(part: Any) -> bool:
    """Tell whether a dataset, iterator or loader has ``state_dict`` and ``load_state_dict``.

    Loaders that accelerate has prepared define both, but only pass on those of the loader inside.
    """
    inner = getattr(part, "base_dataloader", None)
    if inner is not None and not stateful(inner):
        return False
    return callable(getattr(part, "state_dict", None)) and callable(
        getattr(part, "load_state_dict", None)
    )


def exact(dataset: Any) -> bool:
    """Tell whether a dataset goes on from its ``state_dict`` with the very samples it would have given.

    A streaming dataset of ``datasets`` that was shuffled does not: its state leaves out the samples in the
    shuffle buffer, which are lost.
    """
    return stateful(dataset) and not _shuffles_in_buffer(getattr(dataset, "_ex_iterable", None))


def _shuffles_in_buffer(node: Any) -> bool:
    if node is None:
        return False
    if "BufferShuffled" in type(node).__name__:
        return True
    inner = [getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or ())]
    return any(map(_shuffles_in_buffer, inner))


def encode(value: Any, where: str = "state") -> Any:
    """Return a state as what JSON holds; ``decode`` gives it back, types included.

    It may consist of None, booleans, numbers, strings, bytes, lists, tuples, dicts, tensors, and
    arrays and scalars of NumPy.

    Raises:
        TypeError: for anything else, naming where in the state it is.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, where)
    if isinstance(value, bytes):
        return {"$bytes": _text(value)}
    if isinstance(value, Tensor) and value.layout == torch.strided:
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return {
            "$tensor": _text(flat.numpy().tobytes()),
            "dtype": dtype,
            "shape": list(value.shape),
        }
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
        return {kind: _text(value.tobytes()), "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold. Let state_dict() return "
        "numbers, strings, bytes, lists, tuples, dicts, tensors and NumPy arrays."
    )


def _encode_dict(value: dict[Any, Any], where: str) -> dict[str, Any]:
    if all(type(key) is str and not key.startswith(_MARK) for key in value):
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    pairs = [
        [encode(key, f"a key of {where}"), encode(item, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]
    return {"$dict": pairs}


def decode(value: Any) -> Any:
    """Return the state that ``encode`` made JSON of."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if kind in _DECODERS:
        return _DECODERS[kind](value)
    return {key: decode(item) for key, item in value.items()}


def _tensor(value: dict[str, Any]) -> Tensor:
    raw = torch.frombuffer(bytearray(_bytes(value["$tensor"])) or bytearray(1), dtype=torch.uint8)
    raw = raw if value["$tensor"] else raw[:0]
    return raw.view(getattr(torch, value["dtype"])).reshape(value["shape"])


def _array(value: dict[str, Any], kind: str) -> np.ndarray:
    flat = np.frombuffer(_bytes(value[kind]), dtype=np.dtype(value["dtype"]))
    return flat.reshape(value["shape"]).copy()


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "$float": lambda value: float(value["$float"]),
    "$tuple": lambda value: tuple(map(decode, value["$tuple"])),
    "$dict": lambda value: {decode(key): decode(item) for key, item in value["$dict"]},
    "$bytes": lambda value: _bytes(value["$bytes"]),
    "$tensor": _tensor,
    "$array": lambda value: _array(value, "$array"),
    "$scalar": lambda value: _array(value, "$scalar")[()],
}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
