"""``HfArgumentParser``: fill dataclasses from the command line, dicts and files."""

import argparse
import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .converters import TextDefault, add_field
from .legacy import REPLACED, advice

_WORD = re.compile(r"""'([^']*)'|"([^"]*)"|(\S+)""")


def HfArg(
    *,
    aliases: str | list[str] | None = None,
    help: str | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    metadata: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Declare a dataclass field with a help text and further option names.

    Args:
        aliases: Further names of the option, such as ``"-x"`` or ``["--example", "-e"]``.
        help: Text for ``--help``.
        default: Default value, shown by ``--help``.
        default_factory: Function that makes the default value.
        metadata: Further metadata of the field.
        kwargs: Passed on to ``dataclasses.field``.
    """
    metadata = dict(metadata or {})
    if aliases is not None:
        metadata["aliases"] = aliases
    if help is not None:
        metadata["help"] = help
    return dataclasses.field(
        metadata=metadata, default=default, default_factory=default_factory, **kwargs
    )


class HfArgumentParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose options are the fields of dataclasses.

    A field ``some_name`` becomes ``--some_name`` and ``--some-name``. Its ``metadata`` may hold ``help``,
    ``aliases`` (further option names), ``choices``, ``nargs``, ``metavar``, ``const`` and ``required``. A
    dataclass with an attribute ``_argument_group_name`` gets a group of its own in ``--help``.

    | annotation | on the command line |
    |---|---|
    | ``bool`` | ``--x`` or ``--x true``; with default True also ``--no_x`` |
    | ``Enum``, ``Literal`` | one of the values, handed on as the value |
    | ``list[T]`` | one or more values |
    | ``T \\| list[T]`` | one value as it is, several as a list |
    | ``dict`` | JSON text |
    | a union | the first member that reads the text, ``str`` last |

    Args:
        dataclass_types: A dataclass, or several; further options can be added with ``add_argument``.
        kwargs: Passed on to ``argparse.ArgumentParser``.
    """

    dataclass_types: list[Any]

    def __init__(self, dataclass_types: Any | Iterable[Any] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**kwargs)
        if dataclass_types is None:
            dataclass_types = []
        elif dataclasses.is_dataclass(dataclass_types):
            dataclass_types = [dataclass_types]
        self.dataclass_types = list(dataclass_types)
        for dataclass_type in self.dataclass_types:
            self._add_dataclass(dataclass_type)

    def _add_dataclass(self, dataclass_type: Any) -> None:
        title = getattr(dataclass_type, "_argument_group_name", None)
        group = self if title is None else self.add_argument_group(title)
        try:
            hints = typing.get_type_hints(dataclass_type)
        except NameError as error:
            raise RuntimeError(
                f"Cannot read the annotations of {dataclass_type.__name__}: {error}. Declare the "
                "class and the types it names at module level, or leave out "
                "'from __future__ import annotations'."
            ) from error
        for field in dataclasses.fields(dataclass_type):
            if field.init:
                add_field(group, field, hints[field.name])

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as ``argparse`` does, but take defaults as they are: ``"no"`` stays text."""
        found, remaining = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, TextDefault):
                setattr(found, name, value.value)
        return found, remaining

    def parse_args_into_dataclasses(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: str | PathLike[str] | None = None,
        args_file_flag: str | None = None,
    ) -> tuple[Any, ...]:
        """Parse options into instances of the dataclasses.

        Where an option is given more than once, the last one counts: options of files come first (the
        one of ``args_filename``, or else ``<script>.args`` if it exists; then those that the flag
        names, in order), and then ``args``. Words in files are separated by blanks or line ends; a
        word in quotes may contain blanks.

        Args:
            args: Options; left out, those of the command line.
            return_remaining_strings: Return unknown options as a list instead of raising.
            look_for_args_file: Read ``<script>.args`` beside the running script.
            args_filename: File to read instead of that one.
            args_file_flag: Option that names a file to read, such as ``--args_file``; repeatable.

        Returns:
            One instance for each dataclass, in order; a namespace if options were added to the parser
            itself; the unknown options if they were asked for.

        Raises:
            ValueError: There are unknown options.
            FileNotFoundError: A file that was named does not exist.
        """
        given = list(sys.argv[1:] if args is None else args)
        words: list[str] = []
        if args_filename is not None:
            words += _read_words(Path(args_filename))
        elif look_for_args_file and sys.argv:
            beside = Path(sys.argv[0]).with_suffix(".args") if sys.argv[0] else None
            words += _read_words(beside) if beside is not None and beside.is_file() else []
        if args_file_flag is not None:
            files, given = _named_files(args_file_flag, given)
            words += [word for file in files for word in _read_words(Path(file))]
        namespace, remaining = self.parse_known_args(words + given)
        outputs = self._instances(namespace)
        if return_remaining_strings:
            return (*outputs, remaining)
        if remaining:
            raise ValueError(_unknown_options(remaining))
        return tuple(outputs)

    def _instances(self, namespace: argparse.Namespace) -> list[Any]:
        values = vars(namespace)
        outputs = []
        for dataclass_type in self.dataclass_types:
            names = _init_names(dataclass_type)
            inputs = {name: values.pop(name) for name in list(values) if name in names}
            outputs.append(dataclass_type(**inputs))
        if values:
            outputs.append(namespace)
        return outputs

    def parse_dict(self, args: dict[str, Any], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """Fill the dataclasses from a dict, whose values are taken as they are.

        Raises:
            ValueError: A key belongs to no dataclass, and ``allow_extra_keys`` is False.
        """
        unused = set(args)
        outputs = []
        for dataclass_type in self.dataclass_types:
            names = _init_names(dataclass_type)
            unused -= names
            outputs.append(dataclass_type(**{k: v for k, v in args.items() if k in names}))
        if unused and not allow_extra_keys:
            raise ValueError(
                f"Some keys are not used by the HfArgumentParser: {sorted(unused)}"
                f"{_former_names(unused)}"
            )
        return tuple(outputs)

    def parse_json_file(
        self, json_file: str | PathLike[str], allow_extra_keys: bool = False
    ) -> tuple[Any, ...]:
        """Fill the dataclasses from a JSON file that holds an object.

        Raises:
            ValueError: The file holds no object, or a key belongs to no dataclass.
        """
        values = json.loads(Path(json_file).read_text(encoding="utf-8"))
        return self.parse_dict(_object_of(json_file, values), allow_extra_keys)

    def parse_yaml_file(
        self, yaml_file: str | PathLike[str], allow_extra_keys: bool = False
    ) -> tuple[Any, ...]:
        """Fill the dataclasses from a YAML file that holds a mapping.

        Raises:
            ImportError: PyYAML is not installed.
            ValueError: The file holds no mapping, or a key belongs to no dataclass.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError(
                "parse_yaml_file needs PyYAML: pip install 'trainstep[yaml]'."
            ) from error
        values = yaml.safe_load(Path(yaml_file).read_text(encoding="utf-8"))
        return self.parse_dict(_object_of(yaml_file, values), allow_extra_keys)


def _init_names(dataclass_type: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(dataclass_type) if field.init}


def _read_words(path: Path) -> list[str]:
    found = _WORD.finditer(path.read_text(encoding="utf-8"))
    return [next(group for group in match.groups() if group is not None) for match in found]


def _named_files(flag: str, args: list[str]) -> tuple[list[str], list[str]]:
    """Split off the files that ``flag`` names from the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="files", action="append", default=[])
    namespace, others = parser.parse_known_args(args)
    return namespace.files, others


def _unknown_options(remaining: list[str]) -> str:
    names = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in remaining}
    return (
        f"Some specified arguments are not used by the HfArgumentParser: {remaining}"
        f"{_former_names(names)}"
    )


def _former_names(names: Iterable[str]) -> str:
    return "".join(f"; {name}: {advice(name)}" for name in sorted(set(names) & set(REPLACED)))


def _object_of(file: str | PathLike[str], values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(
            f"{file}: expected names and values at the top level, got {type(values).__name__}."
        )
    return values
