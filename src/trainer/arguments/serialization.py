"""Show arguments as text, dict and JSON, with secrets left out."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from .accelerator_config import AcceleratorConfig
from .enums import plain

if TYPE_CHECKING:
    from .base import TrainingArguments

_SECRET_ENDINGS = ("_token", "_api_key", "_password", "_secret")


def is_secret(name: str) -> bool:
    """Tell whether the value of a field must not be shown, by the ending of its name."""
    return name.endswith(_SECRET_ENDINGS)


def placeholder(name: str) -> str:
    """Return what stands for a secret, for example ``<HUB_TOKEN>``."""
    return f"<{name.upper()}>"


class SerializationMixin:
    """``to_dict`` and its relatives."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__repr__ is SerializationMixin.__repr__:
            # ``@dataclass`` generates a ``__repr__``, which would show secrets of the subclass,
            # unless the class itself has one.
            cls.__repr__ = SerializationMixin.__repr__  # type: ignore[method-assign]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that the constructor takes, as plain values.

        Enum members become their values and data types their short names. A secret becomes a
        placeholder such as ``<HUB_TOKEN>``, whether it is set or not; the constructor reads the
        placeholder as None. So ``type(args)(**args.to_dict())`` equals ``args`` but for secrets.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cast("TrainingArguments", self)):
            if field.init:
                hidden = is_secret(field.name)
                value = placeholder(field.name) if hidden else getattr(self, field.name)
                values[field.name] = _plain(value)
        if dataclasses.is_dataclass(values["parallelism_config"]):
            values["parallelism_config"] = _given(values["parallelism_config"])
        return values

    def to_json_string(self) -> str:
        """Return :meth:`to_dict` as JSON with an indent of 2; what JSON lacks is written as text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict` and the two batch sizes, for trackers.

        Any value but a bool, int, float, str or tensor becomes text.
        """
        import torch

        args = cast("TrainingArguments", self)
        values = self.to_dict()
        values["train_batch_size"] = args.train_batch_size
        values["eval_batch_size"] = args.eval_batch_size
        kept = (bool, int, float, str, torch.Tensor)
        return {
            key: value if isinstance(value, kept) else str(value) for key, value in values.items()
        }

    def __str__(self) -> str:
        lines = (f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{''.join(lines)})"

    def __repr__(self) -> str:
        return str(self)


def _plain(value: Any) -> Any:
    """Replace enum members, data types and configuration objects, at any depth."""
    if isinstance(value, AcceleratorConfig):
        return _plain(dict(vars(value)))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else value
        )
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return plain(value)


def _given(config: Any) -> dict[str, Any]:
    """Return the constructor arguments of a dataclass instance that are not None."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(value) for name, value in fields.items() if value is not None}
