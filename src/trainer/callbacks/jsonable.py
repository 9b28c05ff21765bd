"""Turn the values that end up in log records into plain JSON values."""

from __future__ import annotations

import enum
import functools
import logging
import os
from collections.abc import Mapping, Set
from typing import Any

logger = logging.getLogger(__name__)

_PLAIN = (str, int, float, bool, type(None))


def to_jsonable(value: Any, name: str = "value") -> Any:
    """Return `value` built of dicts, lists, strings, numbers, booleans and None only.

    NumPy and torch values of one element become numbers, larger ones nested lists; enums become
    their value, paths text, sets and tuples lists. Anything else becomes its text, with a warning:
    an odd value in a log record must not cost a checkpoint. NaN and infinities stay floats, as
    Python's `json` writes and reads them.

    Args:
        value: What to convert. It is not modified.
        name: What to call it in a warning.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, enum.Enum):
        return to_jsonable(value.value, name)
    if isinstance(value, Mapping):
        items = ((key if isinstance(key, str) else str(key), item) for key, item in value.items())
        return {key: to_jsonable(item, key) for key, item in items}
    if isinstance(value, (list, tuple, Set)):
        return [to_jsonable(item, name) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, torch tensors
        return to_jsonable(_unwrapped(value.tolist()), name)
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    _warn_of_text(name, type(value).__name__)
    return str(value)


def _unwrapped(nested: Any) -> Any:
    """Return the only element of a nested list of one element, otherwise the list itself."""
    element = nested
    while isinstance(element, list) and len(element) == 1:
        element = element[0]
    return nested if isinstance(element, list) else element


@functools.cache  # once per name and type, not at every save
def _warn_of_text(name: str, kind: str) -> None:
    logger.warning(
        "%r holds a %s, which JSON cannot store; its text is stored instead. "
        "Log numbers, strings or lists of them.",
        name,
        kind,
    )
