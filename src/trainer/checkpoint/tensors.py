"""The safetensors format, read and written piece by piece.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little
endian; a JSON header ``{name: {dtype, shape, data_offsets}}``; the data without gaps. What is written
here is read by the ``safetensors`` package and the reverse. The package itself is not used because it
needs all tensors on the host at once, and reads whole tensors where a piece is enough to hash.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import CHUNK, bytes_of, host_tensor, same_bytes

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_PIECE = 1 << 24
"""Bytes that are written at a time."""


Spec = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and the shape of a tensor."""


@frozen
class Entry:
    """One tensor in a file.

    Attributes:
        name: its name there.
        kind: the format's name of its type.
        dtype: its type; None for one that this version does not know.
        shape: its lengths.
        start: where its bytes begin, counted from the end of the header.
        size: how many bytes it has.
    """

    name: str
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    size: int


def storable(dtype: torch.dtype) -> bool:
    """Tell whether the format has a name for ``dtype``; others must be stored as their bytes."""
    return dtype in _NAMES


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    leaf_of: Callable[[str, Tensor], None],
    written: Callable[[], None],
) -> None:
    """Write tensors of any device, layout and sharing to a new file.

    One tensor at a time is brought to the host. ``leaf_of(name, host_tensor)`` is called for each: at
    once for those that had to be copied, so that no copy is kept; for the others after ``written()``,
    which starts to bring the closed file to the disk, so that hashing does not keep that waiting.
    """
    form = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order, head = _header(form)
    later = []
    with io.create(path) as file:
        _put(file, head)
        for name in order:
            tensor = tensors[name]
            host = host_tensor(tensor)
            _put(file, bytes_of(host))
            if host.data_ptr() == tensor.data_ptr():
                later.append((name, host))
            else:
                leaf_of(name, host)
    written()
    for name, host in later:
        leaf_of(name, host)


def write_stream(path: Path, specs: Mapping[str, Spec], value: Callable[[str], Tensor]) -> None:
    """Write tensors to a new file, asking for one after the other: no two need be in memory.

    Args:
        path: the file.
        specs: their dtypes and shapes, by name.
        value: gives a tensor by its name.
    """
    order, head = _header(specs)
    with io.create(path) as file:
        _put(file, head)
        for name in order:
            _put(file, bytes_of(host_tensor(value(name))))


def _header(specs: Mapping[str, Spec]) -> tuple[list[str], bytes]:
    """Return names in the order of their bytes in the file, and what comes before these."""
    # Wide types first, so that each tensor is aligned to its item size in the file.
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        spec = {"dtype": _NAMES[dtype], "shape": list(shape)}
        header[name] = {**spec, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[list[Entry], bytes]:
    """Read only a file's header; return its entries by their place, and the bytes before the data.

    Raises:
        ValueError: if the file is not in the format.
    """
    with open(path, "rb", buffering=0) as file:
        return _read_header(file, path.stat().st_size)


def read_index(path: Path) -> tuple[list[Entry], int]:
    """Read only a file's header; return its entries and where in the file the data begin.

    Raises:
        ValueError: if the file is not in the format.
    """
    entries, header = read_header(path)
    return entries, len(header)


def read_pieces(
    file: Any, size: int, see: Callable[[memoryview], Any], target: memoryview | None = None
) -> None:
    """Read ``size`` bytes, calling ``see`` with piece after piece; with ``target``, into that.

    Raises:
        ValueError: if the file ends before.
    """
    buffer = memoryview(bytearray(min(size, CHUNK))) if target is None else target
    done = 0
    while done < size:
        start = 0 if target is None else done
        count = file.readinto(buffer[start : start + min(CHUNK, size - done)])
        if not count:
            raise ValueError("it ends too early")
        see(buffer[start : start + count])
        done += count


def holds(path: Path, start: int, data: memoryview) -> bool:
    """Tell whether a file has ``data`` at ``start``."""
    place, same = 0, True

    def compare(piece: memoryview) -> None:
        nonlocal place, same
        same = same and same_bytes(piece, data[place : place + len(piece)])
        place += len(piece)

    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        try:
            read_pieces(file, len(data), compare)
        except ValueError:
            return False
    return same


def _put(file: BinaryIO, data: bytes | memoryview) -> None:
    for start in range(0, len(data), _PIECE):
        io.write(file, data[start : start + _PIECE])


def _read_header(file: Any, size: int) -> tuple[list[Entry], bytes]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header is longer than the file")
    text = file.read(length)
    try:
        header = json.loads(text)
        entries = [_entry(name, spec) for name, spec in header.items() if name != "__metadata__"]
        entries.sort(key=lambda entry: (entry.start, entry.size))
        end = 0
        for entry in entries:
            if entry.start != end:
                raise ValueError(f"tensor {entry.name} does not fit its place")
            end += entry.size
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {error}") from None
    if end != size - 8 - length:
        raise ValueError(f"it holds {size - 8 - length} bytes of tensors, its header says {end}")
    return entries, prefix + text


def _entry(name: str, spec: Mapping[str, Any]) -> Entry:
    shape, (start, stop) = tuple(spec["shape"]), spec["data_offsets"]
    if any(type(length) is not int or length < 0 for length in (*shape, start, stop - start)):
        raise ValueError(f"tensor {name} has the shape {shape} and the offsets {start}, {stop}")
    dtype = _DTYPES.get(spec["dtype"])
    # The size of a type that only other programs write is not known; its bytes are still hashed.
    if dtype is not None and math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"tensor {name} does not fit its place")
    return Entry(name, str(spec["dtype"]), dtype, shape, start, stop - start)
