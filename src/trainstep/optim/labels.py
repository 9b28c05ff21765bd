"""Which parameter belongs where: by predicate, by regular expression, by name or by a tree of labels."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

Labels = Callable[[str], Any] | Callable[[str, Tensor], Any] | Mapping[str, Any]
"""Parameter -> label. Either a function of its name, or of its name and the tensor; or a mapping whose
keys are full names or else regular expressions (``re.search``; a full name wins, then the first that
matches); or a nested dict along the dots of the names, in which a label holds for all below it."""

Where = Callable[[str], bool] | Callable[[str, Tensor], bool] | Mapping[str, Any] | Collection[str]
"""Parameter -> whether: what ``Labels`` can be, with bools; or a regular expression; or a set of names."""


_whole: ContextVar[tuple[str, ...]] = ContextVar("whole", default=())
# The names of the outermost optimizer's parameters, while those of its groups are initialised.


def labeller(where: str, labels: Labels) -> Callable[[str, Tensor], Any]:
    """Return a function from a parameter's name and tensor to its label.

    The function raises ValueError for a parameter to which a mapping gives no label.
    """
    if isinstance(labels, Mapping):
        nested = any(isinstance(value, Mapping) for value in labels.values())
        find = _by_tree(where, labels) if nested else _by_pattern(where, labels)
        return lambda name, param: find(name)
    if not callable(labels):
        raise TypeError(f"optim.{where}: labels must be a function or a mapping, got {labels!r}")
    function: Callable[..., Any] = labels
    if _required_arguments(function) >= 2:
        return function
    return lambda name, param: function(name)


def selector(where: str, selected: Where) -> Callable[[str, Tensor], bool]:
    """Return a function from a parameter's name and tensor to whether it is selected."""
    if isinstance(selected, str):
        pattern = re.compile(selected)
        return lambda name, param: pattern.search(name) is not None
    if isinstance(selected, Collection) and not isinstance(selected, Mapping):
        names = frozenset(selected)
        return lambda name, param: name in names
    label_of = labeller(where, selected)
    return lambda name, param: bool(label_of(name, param))


@contextmanager
def within(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Initialise optimizers of groups of ``params`` inside: their patterns may be for other groups."""
    token = _whole.set(_whole.get() or tuple(params))
    try:
        yield
    finally:
        _whole.reset(token)


def check_used(where: str, chosen: Labels | Where, params: Mapping[str, Tensor]) -> None:
    """Check that what ``chosen`` spells out is for some parameter: names, branches of a tree, a pattern.

    Patterns among others in a mapping may match nothing, since such rules are kept for several models,
    unless they read like a name: words joined by dots. Functions may select nothing.

    Raises:
        ValueError: naming what matches nothing, such as misspelt names, and some parameters.
    """
    names = _whole.get() or tuple(params)
    unused = [key for key, matches in _entries(chosen) if not any(map(matches, names))]
    if unused:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(
            f"optim.{where}: no parameter matches {', '.join(map(repr, unused[:8]))}; parameters: "
            f"{', '.join(names[:8])}{more}"
        )


def _entries(chosen: Any) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yield what was written down, and for each a predicate of names."""
    if isinstance(chosen, str):
        yield chosen, re.compile(chosen).search
    elif isinstance(chosen, Mapping):
        nested = any(isinstance(value, Mapping) for value in chosen.values())
        yield from _branches(chosen, "") if nested else _named(chosen)
    elif isinstance(chosen, Collection):
        yield from ((name, name.__eq__) for name in chosen)


def _named(keys: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[str], Any]]]:
    for key in keys:
        if re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
            yield key, re.compile(key).search


def _branches(node: Any, prefix: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    for key, value in node.items():
        path = prefix + key
        yield path, re.compile(rf"{re.escape(path)}(\.|$)").match
        if isinstance(value, Mapping):
            yield from _branches(value, f"{path}.")


def _required_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of C have no signature; those take a name
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _by_pattern(where: str, labels: Mapping[str, Any]) -> Callable[[str], Any]:
    patterns = [(re.compile(pattern), label) for pattern, label in labels.items()]

    def find(name: str) -> Any:
        if name in labels:
            return labels[name]
        for pattern, label in patterns:
            if pattern.search(name):
                return label
        raise ValueError(
            f"optim.{where}: no pattern matches parameter {name}; patterns: {', '.join(labels)}. "
            'Add a last one, ".*".'
        )

    return find


def _by_tree(where: str, labels: Mapping[str, Any]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        node: Any = labels
        rest = name
        while isinstance(node, Mapping):
            # Keys may have dots themselves: the longest that fits is the most specific.
            fitting = [key for key in node if rest == key or rest.startswith(key + ".")]
            if not fitting:
                raise ValueError(
                    f"optim.{where}: the tree of labels has no entry for parameter {name} among "
                    f"{', '.join(node)}"
                )
            key = max(fitting, key=len)
            node, rest = node[key], rest[len(key) + 1 :]
        return node

    return find
