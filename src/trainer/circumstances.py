"""What Python decides in a model's forward pass, and code of others may change between two steps.

A replay of a CUDA graph runs no Python: a coefficient that is annealed, a layer that is frozen or a hook
that is set would have no effect in it. So these are compared whenever somebody could have changed them.
"""

from collections.abc import Iterator, Sized
from typing import Any

from attrs import define, field
from torch import nn

_OTHER: Any = object()
_PLAIN = (bool, int, float, complex, str, type(None))
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Length(int):
    """Of a list: no number of the model's own."""


Look = tuple[list[Any], list[int], list[tuple[bool, int, int]]]
"""Values, or identities; how many hooks and attributes there are; what is said of each parameter."""


@define(eq=False)
class Circumstances:
    """Looks at a model: the attributes of its modules and of their ``config``, hooks, frozen parameters.

    Numbers, strings and flags are compared by value, everything else by being the same object. What lies
    deeper, and what a loss function keeps for itself, is not seen.

    Attributes:
        model: the model.
    """

    model: nn.Module
    _places: list[tuple[str, dict[str, Any], str]] = field(factory=list, init=False)
    _sized: list[Sized] = field(factory=list, init=False)
    _parameters: list[tuple[str, Any]] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.find()

    def find(self) -> None:
        """Find out where to look; done once, because it takes longer than looking does."""
        holders: dict[int, tuple[str, dict[str, Any]]] = {}
        for path, holder in self._holders():
            holders.setdefault(id(holder), (path, holder))
        self._places = [
            (f"{path}{name}", holder, name)
            for path, holder in holders.values()
            for name in holder
            if name not in _MACHINERY
        ]
        self._sized = [holder for _, holder in holders.values()]
        self._sized += [getattr(m, name) for m in self.model.modules() for name in _HOOKS]
        self._parameters = list(self.model.named_parameters())

    def look(self) -> Look:
        """Return how things are."""
        found = [holder.get(name) for _, holder, name in self._places]
        values = [value if type(value) in _PLAIN else id(value) for value in found]
        return values, list(map(len, self._sized)), [_said_of(p) for _, p in self._parameters]

    def numbers(self) -> list[Any]:
        """Return numbers, strings and flags, and the lengths of lists, for ``moved`` and ``put_back``."""
        return [_number(holder.get(name)) for _, holder, name in self._places]

    def moved(self, before: list[Any]) -> str | None:
        """Name one that is another than in ``before``; None if none is."""
        for (path, *_), old, new in zip(self._places, before, self.numbers(), strict=True):
            if old is not new and old != new:
                return path
        return None

    def put_back(self, before: list[Any]) -> None:
        """Give numbers, strings and flags the values that they had."""
        for (_, holder, name), value in zip(self._places, before, strict=True):
            if type(value) in _PLAIN and name in holder:
                holder[name] = value

    def difference(self, before: Look, after: Look) -> str | None:
        """Name what differs between two looks, with no ``find`` between them; None if nothing does."""
        if before == after:
            return None
        for (path, *_), old, new in zip(self._places, before[0], after[0], strict=True):
            if old is not new and old != new:
                return path
        for (path, _), mine, other in zip(self._parameters, before[2], after[2], strict=True):
            if mine != other:
                return f"requires_grad, or a hook, of {path}"
        return "its hooks, or which attributes its modules have"

    def _holders(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the dictionaries that things are kept in, with the path that leads there."""
        for name, module in self.model.named_modules():
            path = f"{name}." if name else ""
            for holder in (vars(module), module._parameters, module._buffers, module._modules):
                yield path, holder
            config = getattr(module, "config", None)
            if hasattr(config, "__dict__"):
                yield f"{path}config.", vars(config)


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody else's code runs in the model's passes; hooks marked ``recordable`` do not count."""
    everywhere = nn.modules.module
    if everywhere._has_any_global_hook():
        return True
    for module in model.modules():
        forward = module._forward_hooks.values()
        if any(not getattr(hook, "recordable", False) for hook in forward):
            return True
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return any(sum(_said_of(parameter)[1:]) for parameter in model.parameters())


def _number(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    return _Length(len(value)) if type(value) in (list, dict, set) else _OTHER


def _said_of(parameter: Any) -> tuple[bool, int, int]:
    later = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.requires_grad, len(parameter._backward_hooks or ()), len(later or ())
