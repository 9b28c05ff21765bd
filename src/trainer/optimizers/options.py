"""Options of an optimizer object's groups, which schedulers and callbacks may change while it trains.

The pure optimizer is built of what they were. Those that it takes as hyperparameters are given to it anew
when they have changed; of the others it is told that they have no effect.
"""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from attrs import frozen

Group = dict[str, Any]

_ADAM = {"betas": ("beta1", "beta2"), "eps": ("eps",), "weight_decay": ("weight_decay",)}
# By class: the hyperparameters that an option is, and the options that are built in.
_KINDS: dict[type, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    torch.optim.AdamW: (_ADAM, ("amsgrad", "maximize")),
    torch.optim.Adam: (_ADAM, ("amsgrad", "maximize", "decoupled_weight_decay")),
    torch.optim.SGD: (
        {name: (name,) for name in ("momentum", "weight_decay")},
        ("dampening", "nesterov", "maximize"),
    ),
    torch.optim.RMSprop: (
        {name: (name,) for name in ("alpha", "eps", "weight_decay", "momentum")},
        ("centered", "maximize"),
    ),
}


@frozen(eq=False)
class Options:
    """The options of one group as they were when the pure optimizer was built.

    Attributes:
        label: the group's name in the pure optimizer.
        live: option -> names of the hyperparameters that it is.
        fixed: options that are built in.
        read: the values of all of them in a group.
        built: these, as they were.
    """

    label: str
    live: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...]
    read: Callable[[Group], tuple[Any, ...]]
    built: tuple[Any, ...]

    def hyper(self, group: Group) -> dict[str, float]:
        """Return the hyperparameters that are others than built, under the names of this group."""
        built = dict(zip(self._names, self.built, strict=True))
        found: dict[str, float] = {}
        for option, names in self.live.items():
            pairs = zip(names, _each(group[option]), _each(built[option]), strict=True)
            found |= {f"{self.label}/{name}": float(now) for name, now, was in pairs if now != was}
        return found

    def kept(self, group: Group) -> dict[str, Any]:
        """Return what a checkpoint has to keep: the options that are others than built, and do count."""
        found = {name: now for name, now in self.changed(group).items() if name in self.live}
        return {name: _numbers(now) for name, now in found.items()}

    def changed(self, group: Group) -> dict[str, Any]:
        """Return the options that are others than built."""
        pairs = zip(self._names, self.read(group), self.built, strict=True)
        return {name: now for name, now, was in pairs if now != was}

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.live, *self.fixed)


def options_of(optimizer: torch.optim.Optimizer) -> tuple[Options, ...]:
    """Return the options of every group of an optimizer whose class is translated."""
    live, fixed = _KINDS[type(optimizer)]
    return tuple(
        _options(f"group{number}", live, fixed, group)
        for number, group in enumerate(optimizer.param_groups)
    )


def _options(
    label: str, live: dict[str, tuple[str, ...]], fixed: tuple[str, ...], group: Group
) -> Options:
    if group.get("momentum") == 0:  # then there are no buffers, and none can be had later
        live, fixed = {k: v for k, v in live.items() if k != "momentum"}, (*fixed, "momentum")
    fixed = tuple(name for name in fixed if name in group)
    read = itemgetter(*live, *fixed)
    return Options(label, live, fixed, read, read(group))


def _numbers(value: Any) -> Any:
    """Return an option's value in Python's own numbers, which JSON holds."""
    return [float(part) for part in value] if isinstance(value, tuple | list) else float(value)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
