"""Turn a dataclass field into an option of ``argparse``, by its annotation and metadata."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from .convert import json_object, parse_bool

_UNIONS = (types.UnionType, typing.Union)
_SCALARS = (int, float, str, Path)
Convert = Callable[[str], Any]
_PASSED_ON = ("choices", "const", "help", "metavar", "nargs", "required")


def string_to_bool(value: Any) -> bool:
    """Read a boolean as the command line spells it; see :func:`.convert.parse_bool`.

    Raises:
        argparse.ArgumentTypeError: The text spells no boolean.
    """
    if isinstance(value, bool):
        return value
    return _reading(parse_bool, "boolean")(value)


class TextDefault:
    """A default that is text, which ``argparse`` would otherwise read as if it had been typed in."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


class OneOrMany(argparse.Action):
    """Store one value as it is, and several as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store ``values``, a list with at least one entry."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_field(group: Any, field: "dataclasses.Field[Any]", hint: Any) -> None:
    """Add the option of a field to a parser or a group of one.

    Args:
        group: Where to add it.
        field: The field; its metadata may override what its type implies.
        hint: Its resolved annotation.

    Raises:
        ValueError: See :func:`argument_options`.
    """
    aliases = field.metadata.get("aliases", [])
    flags = [f"--{field.name}", *([aliases] if isinstance(aliases, str) else aliases)]
    if "_" in field.name:
        flags.insert(1, f"--{field.name.replace('_', '-')}")
    options = argument_options(field.name, hint)
    options |= {key: field.metadata[key] for key in _PASSED_ON if key in field.metadata}
    if field.default is not dataclasses.MISSING:
        options["default"] = field.default
    elif field.default_factory is not dataclasses.MISSING:
        options["default"] = field.default_factory()
    elif hint is bool:
        options["default"] = False
    else:
        options.setdefault("required", True)
    if isinstance(options.get("default"), str) and options["type"] is not str:
        options["default"] = TextDefault(options["default"])
    group.add_argument(*flags, dest=field.name, **options)
    if options.get("default") is True and options.get("const") is True:
        negations = dict.fromkeys(f"--no{mark}{field.name.replace('_', mark)}" for mark in "_-")
        group.add_argument(*negations, dest=field.name, action="store_false", default=True)


def argument_options(name: str, hint: Any) -> dict[str, Any]:
    """Return ``type``, ``nargs``, ``choices`` and ``action`` for a field of this type.

    Args:
        name: Name of the field, for the error.
        hint: Its resolved annotation.

    Raises:
        ValueError: The annotation is a union of which no member can be read from text.
    """
    members = _without_none(hint)
    lists = [item for item in members if typing.get_origin(item) is list or item is list]
    if lists:
        return _list_options(name, lists[0], [item for item in members if item not in lists])
    options: dict[str, Any] = {"type": _reader(name, members)}
    choices = _choices(members)
    if choices is not None:
        options["choices"] = choices
    if bool in members:
        options |= {"nargs": "?", "const": True}
    return options


def _without_none(hint: Any) -> list[Any]:
    if typing.get_origin(hint) not in _UNIONS:
        return [hint]
    return [item for item in typing.get_args(hint) if item is not type(None)]


def _list_options(name: str, hint: Any, others: list[Any]) -> dict[str, Any]:
    """Options for ``list[T]``, or for a union of it with single values such as ``str | list[str]``."""
    element = _without_none((typing.get_args(hint) or (str,))[0])
    options: dict[str, Any] = {"nargs": "+"}
    if others:
        options |= {"type": _reader(name, others), "action": OneOrMany}
    else:
        options["type"] = _reader(name, element)
        choices = _choices(element)
        if choices is not None:
            options["choices"] = choices
    return options


def _choices(members: Sequence[Any]) -> list[Any] | None:
    """Return the values of an enum (also beside ``str``) or of a lone ``Literal``."""
    enums = [item for item in members if _is_enum(item)]
    if enums and all(_is_enum(item) or item is str for item in members):
        return [member.value for enum in enums for member in enum]
    if all(typing.get_origin(item) is Literal for item in members):
        return [value for item in members for value in typing.get_args(item) if value is not None]
    return None


def _reader(name: str, members: Sequence[Any]) -> Convert:
    """Return a function that reads text as the first member that takes it; ``str`` is the last."""
    readers = [_read_one(item) for item in sorted(members, key=_rank)]
    known = [reader for reader in readers if reader is not None]
    if not known:
        raise ValueError(
            f"Field {name!r}: none of the types {', '.join(map(str, members))} can be read from the "
            "command line; use bool, int, float, str, Path, an Enum, a Literal, a dict or a list, or "
            "declare the field with init=False."
        )
    if len(known) == 1:
        return known[0]

    def read(text: str) -> Any:
        for reader in known[:-1]:
            try:
                return reader(text)
            except (ValueError, argparse.ArgumentTypeError):
                continue
        return known[-1](text)

    return read


def _rank(item: Any) -> int:
    """Order in which members are tried: text fits everything, so it comes last."""
    if item is str:
        return 3
    if item is Path:
        return 4
    return 2 if item is dict or typing.get_origin(item) is dict else 1


def _read_one(item: Any) -> Convert | None:
    origin = typing.get_origin(item)
    if origin is Literal:
        return _choice_reader(typing.get_args(item))
    if _is_enum(item):
        return _choice_reader([member.value for member in item])
    if item is bool:
        return string_to_bool
    if item is dict or origin is dict:
        return _reading(json_object, "JSON object")
    if item is Any:
        return str
    if item in _SCALARS or (origin is None and callable(item)):
        reader: Convert = item
        return reader
    return None


def _choice_reader(choices: Sequence[Any]) -> Convert:
    """Return a function that maps text to the choice of that spelling, or to itself without one.

    With a boolean among the choices, its other spellings (``no``, ``0``) are read too. What is not a
    choice is left to ``argparse``, whose error lists the choices; beside other types it is an error.
    """
    spelled = {str(choice): choice for choice in choices}

    def read(text: str) -> Any:
        if text in spelled:
            return spelled[text]
        for choice in choices:
            if isinstance(choice, bool):
                try:
                    if parse_bool(text) is choice:
                        return choice
                except ValueError:
                    break
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(map(repr, choices))})"
        )

    return read


def _reading(function: Convert, expected: str) -> Convert:
    """Let ``argparse`` show the message of a ``ValueError``, which it hides otherwise."""

    def read(text: str) -> Any:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{expected}: {error}") from error

    return read


def _is_enum(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Enum)
