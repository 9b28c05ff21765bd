"""The safetensors format, read and written piece by piece so that hashing runs beside the disk.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little
endian; a JSON header ``{name: {dtype, shape, data_offsets}}``; the data without gaps. What is written
here is read by the ``safetensors`` package and the reverse. The package itself is not used because it
neither hashes what it writes nor writes without all tensors on the host.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.hashing import CHUNK, Hashing, bytes_of, host_tensor, new_sha

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


@frozen
class Entry:
    """One tensor in a file.

    Attributes:
        name: its name there.
        dtype: its type; None for one that this version does not know.
        shape: its lengths.
        start: where its bytes begin, counted from the end of the header.
        size: how many bytes it has.
    """

    name: str
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
    hashing: Hashing,
    leaf_of: Callable[[str, Tensor], None],
) -> Any:
    """Write tensors of any device, layout and sharing to a new file and bring it to the disk.

    One tensor at a time is brought to the host. ``leaf_of(name, host_tensor)`` is called for each.

    Returns:
        The file's SHA-256 object, final after ``hashing.join()``.
    """
    # Wide types first, so that each tensor is aligned to its item size in the file.
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        spec = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**spec, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = new_sha()
    with io.create(path) as file:
        _put(file, len(text).to_bytes(8, "little") + text, sha, hashing)
        for name, tensor in order:
            host = host_tensor(tensor)
            _put(file, bytes_of(host), sha, hashing)
            leaf_of(name, host)
        io.sync_open(file)
    return sha


def read_tensors(
    path: Path, hashing: Hashing, sha: Any, wanted: Callable[[Entry], bool] = lambda entry: True
) -> Iterator[tuple[Entry, Tensor | None]]:
    """Read a file once, front to back, feeding all of it to ``sha``; yield each tensor read.

    Args:
        path: the file.
        hashing: where the digests are computed.
        sha: a SHA-256 object, final after ``hashing.join()``.
        wanted: which entries to make a tensor of; the others are only hashed and yield None.

    Raises:
        ValueError: if the file is not in the format, without having allocated what it claims.
    """
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        entries, header = _read_header(file, size)
        hashing.update(sha, header)
        for entry in entries:
            if entry.dtype is None or not wanted(entry):
                skim(file, entry.size, sha, hashing)
                yield entry, None
                continue
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            _fill(file, bytes_of(tensor), sha, hashing)
            yield entry, tensor


def read_index(path: Path) -> tuple[list[Entry], int]:
    """Read only a file's header; return its entries and where in the file the data begin.

    Raises:
        ValueError: if the file is not in the format.
    """
    with open(path, "rb", buffering=0) as file:
        entries, header = _read_header(file, path.stat().st_size)
    return entries, len(header)


def read_bytes(path: Path, start: int, size: int) -> bytearray:
    """Read ``size`` bytes at ``start``; fewer if the file ends there."""
    data = bytearray(size)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < size and (count := file.readinto(memoryview(data)[done:])):
            done += count
    return data[:done] if done < size else data


def skim(file: Any, size: int, sha: Any, hashing: Hashing) -> None:
    """Read ``size`` bytes for their hash alone."""
    while size:
        data = file.read(min(size, CHUNK))
        if not data:
            raise ValueError("it ends too early")
        hashing.update(sha, data)
        size -= len(data)


def _put(file: BinaryIO, data: bytes | memoryview, sha: Any, hashing: Hashing) -> None:
    for start in range(0, len(data), CHUNK):
        piece = data[start : start + CHUNK]
        io.write(file, piece)
        hashing.update(sha, piece)


def _fill(file: Any, target: memoryview, sha: Any, hashing: Hashing) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + CHUNK])
        if not count:
            raise ValueError("it ends too early")
        hashing.update(sha, target[done : done + count])
        done += count


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
    return Entry(name, dtype, shape, start, stop - start)
