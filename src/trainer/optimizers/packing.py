"""What optimizers keep, as trees of tensors and plain values, which is all that a checkpoint holds.

Some libraries keep more than that: objects (GaLore's projectors), tensors of quantized numbers
(torchao), dicts whose keys are parameters (GrokAdamW). Each becomes a dict with a marked key. Classes
are named in it, and only those listed here are ever looked up, so reading a checkpoint runs no code of
its writer's choice.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

# By their full names, so that none is imported before it is needed.
_OBJECTS = (
    "galore_torch.galore_projector.GaLoreProjector",
    "apollo_torch.random_projector.GradientProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
)
_TENSORS = (
    "torchao.optim.subclass_4bit.OptimState4bit",
    "torchao.optim.subclass_8bit.OptimState8bit",
    "torchao.optim.subclass_fp8.OptimStateFp8",
)
_OBJECT, _TENSOR, _BY_PARAMETER, _DTYPE = "@object", "@tensor", "@by_parameter", "@dtype"
_STRIDED = "@strided"  # files hold tensors as rows; the order in memory decides how products round


def pack(value: Any, names: dict[Tensor, str]) -> Any:
    """Return a value of an optimizer's state as a tree; what is not known stays as it is.

    Args:
        value: a tensor, number, container or object. Tensors are not copied.
        names: the names of the parameters.
    """
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in _TENSORS:
        parts, context = value.__tensor_flatten__()
        tensors = {part: getattr(value, part) for part in parts}
        return {_TENSOR: name, "parts": tensors, "context": pack(list(context), names)}
    if name in _OBJECTS:
        return {_OBJECT: name, "fields": pack(dict(vars(value)), names)}
    if isinstance(value, Tensor) and not value.is_contiguous():
        return {_STRIDED: value, "stride": list(value.stride())}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        if any(isinstance(key, Tensor) for key in value):
            kept = {names[key]: item for key, item in value.items() if key in names}
            return {_BY_PARAMETER: pack(kept, names)}
        return {key: pack(item, names) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(pack(item, names) for item in value)
    return tuple(value) if isinstance(value, torch.Size) else value


def unpack(value: Any, live: dict[str, Tensor]) -> Any:
    """Return what ``pack`` was given; tensors are copied only where their order in memory differs.

    Raises:
        ValueError: for a class that is not among those known.
    """
    if isinstance(value, list | tuple):
        return type(value)(unpack(item, live) for item in value)
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        cls, context = _find(value[_TENSOR], _TENSORS), unpack(value["context"], live)
        return cls.__tensor_unflatten__(value["parts"], context, None, None)
    if _STRIDED in value:
        tensor: Tensor = value[_STRIDED]
        if list(tensor.stride()) == value["stride"]:
            return tensor
        return torch.empty_strided(
            tensor.shape, value["stride"], dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)
    if _OBJECT in value:
        cls = _find(value[_OBJECT], _OBJECTS)
        made = cls.__new__(cls)
        vars(made).update(unpack(value["fields"], live))
        return made
    if _DTYPE in value:
        return getattr(torch, value[_DTYPE])
    if _BY_PARAMETER in value:
        return {live[name]: unpack(item, live) for name, item in value[_BY_PARAMETER].items()}
    return {key: unpack(item, live) for key, item in value.items()}


def place(value: Any, device: torch.device) -> Any:
    """Return a packed value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: place(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(place(item, device) for item in value)
    return value


def _find(name: str, known: tuple[str, ...]) -> Any:
    if name not in known:
        raise ValueError(
            f"the optimizer's state holds an object of class {name!r}; known are {', '.join(known)}"
        )
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)
