"""Which parameter belongs where: by predicate, by regular expression, by name or by a tree of labels."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

Labels = Callable[[str], Any] | Callable[[str, Tensor], Any] | Mapping[str, Any]
"""Parameter -> label. Either a function of its name, or of its name and the tensor; or a mapping whose
keys are full names or else regular expressions (``re.search``; a full name wins, then the first that
matches); or a nested dict along the dots of the names, in which a label holds for all below it."""

Where = Callable[[str], bool] | Callable[[str, Tensor], bool] | Mapping[str, Any] | Collection[str]
"""Parameter -> whether: what ``Labels`` can be, with bools; or a regular expression; or a set of names."""


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
