"""What Python decides in a model's forward pass, and code of others may change between two steps.

A replay of a CUDA graph runs no Python: a coefficient that is annealed, a layer that is frozen or a hook
that is set would have no effect in it. So these are compared whenever somebody could have changed them.
"""

from collections.abc import Iterator, Sized
from operator import is_
from typing import Any

from attrs import define, field, frozen
from torch import nn

_OTHER: Any = object()
_PLAIN = (bool, int, float, complex, str, type(None))
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Length(int):
    """Of a list: no number of the model's own."""


@frozen
class Look:
    """How things are: attributes, how many hooks and attributes there are, and parameters."""

    values: list[Any]
    sizes: list[int]
    trained: list[bool]
    hooks: list[Any]

    def same(self, other: "Look") -> bool:
        """Whether everything is the same object; what was merely set again is not."""
        return (
            all(map(is_, self.values, other.values))
            and self.sizes == other.sizes
            and self.trained == other.trained
            and all(map(is_, self.hooks, other.hooks))
        )


@define(eq=False)
class Circumstances:
    """Looks at a model: the attributes of its modules and of their ``config``, hooks, frozen parameters.

    Numbers, strings and flags are compared by value, everything else by being the same object, unless
    the forward pass itself puts another one there. What lies deeper, and what a loss function keeps for
    itself, is not seen.

    Attributes:
        model: the model.
    """

    model: nn.Module
    _places: list[tuple[dict[str, Any], str]] = field(factory=list, init=False)
    _paths: list[str] = field(factory=list, init=False)
    _sized: list[Sized] = field(factory=list, init=False)
    _parameters: list[Any] = field(factory=list, init=False)
    _fleeting: set[tuple[int, str]] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self.find()

    def find(self) -> None:
        """Find out where to look; done once, because it takes longer than looking does."""
        holders: dict[int, tuple[str, dict[str, Any]]] = {}
        for path, holder in self._holders():
            holders.setdefault(id(holder), (path, holder))
        self._places, self._paths = [], []
        for path, holder in holders.values():
            names = [name for name in holder if name not in _MACHINERY]
            self._places += [(holder, name) for name in names]
            self._paths += [f"{path}{name}" for name in names]
        self._sized = [holder for _, holder in holders.values()]
        self._sized += [getattr(m, name) for m in self.model.modules() for name in _HOOKS]
        self._parameters = list(self.model.parameters())

    def look(self) -> Look:
        """Return how things are. Written out, because it may run in every step."""
        parameters = self._parameters
        return Look(
            [holder.get(name) for holder, name in self._places],
            list(map(len, self._sized)),
            [p.requires_grad for p in parameters],
            [p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters],
        )

    def difference(self, before: Look, after: Look) -> str | None:
        """Name what differs between two looks, with no ``find`` between them; None if nothing does."""
        if before.same(after):
            return None
        found = zip(self._places, self._paths, before.values, after.values, strict=True)
        for (holder, name), path, old, new in found:
            if old is new or (id(holder), name) in self._fleeting:
                continue
            kind = type(old)
            if kind not in _PLAIN or type(new) is not kind or old != new:
                return path
        names = [name for name, _ in self.model.named_parameters()]
        said = zip(names, before.trained, after.trained, before.hooks, after.hooks, strict=False)
        for name, was, now, hooks, later in said:
            if was != now or hooks is not later:
                return f"requires_grad, or a hook, of {name}"
        if before.sizes != after.sizes:
            return "its hooks, or which attributes its modules have"
        return None

    def passed(self, before: Look) -> None:
        """Note which objects a pass has put in the place of others since ``before``: those are its own."""
        values = self.look().values
        for (holder, name), old, new in zip(self._places, before.values, values, strict=True):
            if old is not new and type(new) not in _PLAIN:
                self._fleeting.add((id(holder), name))

    def numbers(self) -> list[Any]:
        """Return numbers, strings and flags, and the lengths of lists, for ``moved`` and ``put_back``."""
        return [_number(holder.get(name)) for holder, name in self._places]

    def moved(self, before: list[Any]) -> str | None:
        """Name one that is another than in ``before``; None if none is."""
        for path, old, new in zip(self._paths, before, self.numbers(), strict=True):
            if old is not new and old != new:
                return path
        return None

    def put_back(self, before: list[Any]) -> None:
        """Give numbers, strings and flags the values that they had."""
        for (holder, name), value in zip(self._places, before, strict=True):
            if type(value) in _PLAIN and name in holder:
                holder[name] = value

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
    parameters: Any = model.parameters()
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def _number(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    return _Length(len(value)) if type(value) in (list, dict, set) else _OTHER
