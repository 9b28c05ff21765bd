"""``TrainState`` to and from flat tensors and JSON: the pure half of a checkpoint. No I/O here."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainstep.members import Keys, Members
from trainstep.rng import Key
from trainstep.state import TrainState

FORMAT = 1
"""Version of the metadata's layout."""


def to_flat(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state into tensors by path and JSON-able metadata; nothing is copied.

    Tensors keep their strides and may be non-contiguous (a transposed weight, say) or share storage, which
    some file formats refuse: for safetensors, write ``tensor.contiguous()``. ``from_flat`` takes either.

    Returns:
        ``(tensors, metadata)``: paths are those of ``trainstep.diff``, such as ``params/head.weight``.
        The metadata holds step, key, and the structure with all leaves that are not tensors.

    Raises:
        TypeError: for a leaf that is no tensor, number, string or None, with its path.
        ValueError: if two tensors have one path, because a key holds a slash.
    """
    tensors: dict[str, Tensor] = {}
    parts = {
        "params": state.params,
        "buffers": state.buffers,
        "opt_state": state.opt_state,
        "extras": state.extras,
    }
    structure = {name: _describe(value, name, tensors) for name, value in parts.items()}
    # 64-bit keys as text: JSON readers elsewhere round large integers.
    metadata = {
        "format": FORMAT,
        "step": state.step,
        "key": _write_key(state.key),
        "structure": structure,
    }
    return tensors, metadata


def from_flat(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> TrainState:
    """Rebuild a state; the inverse of ``to_flat``, lossless.

    Raises:
        ValueError: naming tensors that are missing, unexpected, or of another shape or dtype than the
            metadata says; or for metadata of an unknown format.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"from_flat: metadata has format {metadata.get('format')!r}, this version reads {FORMAT}"
        )
    used: set[str] = set()
    problems: list[str] = []
    parts = {
        name: _rebuild(spec, tensors, used, problems)
        for name, spec in metadata["structure"].items()
    }
    problems += [f"unexpected: {path}" for path in tensors if path not in used]
    if problems:
        raise ValueError("from_flat: tensors do not fit the metadata:\n  " + "\n  ".join(problems))
    return TrainState(step=metadata["step"], key=_read_key(metadata["key"]), **parts)


def check_like(state: TrainState, like: TrainState) -> None:
    """Check that ``state`` can continue the run of ``like``: same leaves, shapes and dtypes.

    Raises:
        ValueError: listing every missing, unexpected or mis-shaped leaf.
    """
    given, wanted = to_flat(state)[0], to_flat(like)[0]
    problems = [f"missing: {path}" for path in wanted if path not in given]
    problems += [f"unexpected: {path}" for path in given if path not in wanted]
    for path, tensor in wanted.items():
        other = given.get(path)
        if other is not None and (other.shape != tensor.shape or other.dtype != tensor.dtype):
            problems.append(f"differs: {path} is {_form(other)}, expected {_form(tensor)}")
    if problems:
        raise ValueError(
            "the state does not fit this model or optimizer:\n  " + "\n  ".join(problems)
        )


def _write_key(key: Key | Keys) -> str | list[str]:
    return [f"{b:016x}" for b in key.bits] if isinstance(key, Keys) else f"{key.bits:016x}"


def _read_key(text: str | list[str]) -> Any:
    return Key(int(text, 16)) if isinstance(text, str) else Keys(tuple(int(b, 16) for b in text))


def _describe(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(
                f"to_flat: two leaves have the path {path}; rename a key that holds a slash"
            )
        tensors[path] = value.detach()
        return {"tensor": path, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, dict):
        items = [[k, _describe(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        kind = type(value).__name__
        return {kind: [_describe(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, Members):  # of a stacked state, see trainstep.vmap
        values = enumerate(value.values)
        return {"members": [_describe(v, f"{path}/{i}", tensors) for i, v in values]}
    if isinstance(value, float):
        return {"float": value.hex()}  # exact, and JSON has no infinities
    if value is None or isinstance(value, bool | int | str):
        return {"value": value}
    raise TypeError(
        f"to_flat: {path} is a {type(value).__name__}; a state holds tensors, numbers, strings, None, "
        "and dicts, lists and tuples of them"
    )


def _rebuild(
    spec: Mapping[str, Any], tensors: Mapping[str, Tensor], used: set[str], problems: list[str]
) -> Any:
    if "tensor" in spec:
        path = spec["tensor"]
        used.add(path)
        tensor = tensors.get(path)
        if tensor is None:
            problems.append(f"missing: {path}")
        elif list(tensor.shape) != spec["shape"] or str(tensor.dtype) != spec["dtype"]:
            expected = f"{spec['dtype']} {tuple(spec['shape'])}"
            problems.append(f"differs: {path} is {_form(tensor)}, expected {expected}")
        return tensor
    if "dict" in spec:
        return {k: _rebuild(v, tensors, used, problems) for k, v in spec["dict"]}
    if "list" in spec:
        return [_rebuild(v, tensors, used, problems) for v in spec["list"]]
    if "tuple" in spec:
        return tuple(_rebuild(v, tensors, used, problems) for v in spec["tuple"])
    if "members" in spec:
        return Members(tuple(_rebuild(v, tensors, used, problems) for v in spec["members"]))
    return float.fromhex(spec["float"]) if "float" in spec else spec["value"]


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
