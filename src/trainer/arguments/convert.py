"""Turn text into the values that fields hold: numbers, booleans, JSON."""

import json
import re
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

_TRUE = frozenset({"yes", "true", "t", "y", "1"})
_FALSE = frozenset({"no", "false", "f", "n", "0"})
_INTEGER = re.compile(r"[+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


def parse_bool(text: str) -> bool:
    """Read yes/true/t/y/1 and no/false/f/n/0, in any case.

    Raises:
        ValueError: The text is none of these.
    """
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"expected yes/true/t/y/1 or no/false/f/n/0, got {text!r}")


def convert_leaves(value: Any) -> Any:
    """Replace strings that spell a boolean or a number, at any depth of dicts and lists."""
    if isinstance(value, dict):
        return {key: convert_leaves(item) for key, item in value.items()}
    if isinstance(value, list):
        return [convert_leaves(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if _INTEGER.fullmatch(value):
        return int(value)
    return float(value) if _DECIMAL.fullmatch(value) else value


def json_object(text: str) -> dict[str, Any]:
    """Read JSON text that must be an object; its string leaves become numbers where they spell one.

    Raises:
        ValueError: The text is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    converted: dict[str, Any] = convert_leaves(value)
    return converted


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """Turn a dict, JSON text or the path of a JSON file into a new dict; ``None`` stays ``None``.

    Raises:
        ValueError: The value is neither of these; the message starts with ``name``.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        text = value
    elif isinstance(value, str | PathLike) and Path(value).is_file():
        text = Path(value).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"{name}: expected a dict, JSON text or the path of a JSON file, got {value!r}."
        )
    try:
        return json_object(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def scalar_type(annotation: Any) -> type | None:
    """Return ``bool``, ``int`` or ``float`` if the annotation is that, or that or ``None``."""
    members = [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        members = [item for item in typing.get_args(annotation) if item is not type(None)]
    if len(members) == 1 and members[0] in (bool, int, float):
        found: type = members[0]
        return found
    return None


def as_scalar(name: str, kind: type, value: Any) -> Any:
    """Make a value fit a ``bool``, ``int`` or ``float`` field; ``None`` stays ``None``.

    Text is read, and NumPy numbers become Python numbers. A whole number stays an ``int`` in a
    ``float`` field, and becomes one in an ``int`` field.

    Raises:
        ValueError: The value does not fit; the message starts with ``name``.
    """
    if value is None or type(value) is kind:
        return value
    try:
        if kind is bool:
            return _as_bool(value)
        return _as_number(kind, value)
    except (OverflowError, TypeError, ValueError) as error:
        expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name}: expected {expected}, got {value!r}.") from error


def _as_bool(value: Any) -> bool:
    return parse_bool(value if isinstance(value, str) else str(value))


def _as_number(kind: type, value: Any) -> int | float:
    if isinstance(value, str):
        value = float(value) if kind is float or not _INTEGER.fullmatch(value) else int(value)
    if not isinstance(value, Real):
        raise TypeError("not a real number")
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError("not whole")
    return int(number)
