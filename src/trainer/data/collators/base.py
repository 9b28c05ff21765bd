"""What all collators share: the type, the choice of framework, and the checks of their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DataCollator = Callable[[list[Any]], dict[str, Any]]
"""A function from a list of dataset rows to one batch."""

TENSOR_KINDS = ("pt", "np")
"""The values of ``return_tensors``: PyTorch tensors or NumPy arrays."""


class DataCollatorMixin:
    """Dispatches a call to ``torch_call`` or ``numpy_call`` according to ``return_tensors``.

    Subclasses implement at least ``torch_call(rows)``. ``return_tensors`` of the call, if given,
    goes before the attribute.
    """

    return_tensors: str = "pt"

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> Any:
        """Collates ``features``; raises ValueError or TypeError on unusable input."""
        where = type(self).__name__
        kind = require_kind(where, return_tensors, self.return_tensors)
        require_rows(where, features)
        return self.torch_call(features) if kind == "pt" else self.numpy_call(features)

    def torch_call(self, features: list[Any]) -> Any:
        """Collates ``features`` into PyTorch tensors."""
        raise NotImplementedError(
            f"{type(self).__name__} has no torch_call(features), which return_tensors='pt' needs. "
            f"Define it, or override __call__."
        )

    def numpy_call(self, features: list[Any]) -> Any:
        """Collates ``features`` into NumPy arrays."""
        raise NotImplementedError(
            f"{type(self).__name__} has no numpy_call(features), which return_tensors='np' needs. "
            f"Define it, or use return_tensors='pt'."
        )


def require_kind(where: str, return_tensors: Any, default: str = "pt") -> str:
    """The framework named, ``default`` for None; raises ValueError if it is none we know."""
    if return_tensors is None:
        return_tensors = default
    if return_tensors not in TENSOR_KINDS:
        raise ValueError(
            f"{where}: return_tensors must be one of {', '.join(map(repr, TENSOR_KINDS))}, "
            f"got {return_tensors!r}."
        )
    return return_tensors


def require_rows(where: str, features: Any) -> None:
    """Raises TypeError unless ``features`` is a list of rows, ValueError if it is empty."""
    sequence = hasattr(features, "__len__") and hasattr(features, "__getitem__")
    if isinstance(features, (Mapping, str, bytes)) or not sequence:
        raise TypeError(
            f"{where}: expected a list of dataset rows, got {type(features).__name__}. "
            f"Pass rows, such as [dataset[i] for i in indices]; a slice of a table gives columns."
        )
    if len(features) == 0:
        raise ValueError(
            f"{where}: the list of rows is empty; a batch needs at least one row. "
            f"Check the batch sampler, or what removed the rows."
        )


def require_methods(where: str, tokenizer: Any, *names: str) -> None:
    """Raises TypeError unless ``tokenizer`` has a method of each of the names."""
    missing = [name for name in names if not callable(getattr(tokenizer, name, None))]
    if missing:
        raise TypeError(
            f"{where}: tokenizer must have the method {', '.join(missing)}, "
            f"got {type(tokenizer).__name__}. Pass the tokenizer or feature extractor itself."
        )


def require_mask_token(where: str, tokenizer: Any, advice: str) -> None:
    """Raises ValueError, ending in ``advice``, if the tokenizer has no mask token."""
    if getattr(tokenizer, "mask_token", None) is None:
        raise ValueError(
            f"{where}: the tokenizer ({type(tokenizer).__name__}) does not have a mask token, "
            f"which masking needs. {advice}"
        )
