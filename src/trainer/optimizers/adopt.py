"""A torch optimizer object as the pure optimizer that has its bits.

Objects of well-known classes are translated into the core's kernels, group by group; the object stays to be
looked at, and shares its state tensors with the ``TrainState``. Objects of other classes run themselves,
wrapped so that the step sees a function.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

import trainstep as ts
from trainer.optimizers.fused import FusedUpdates, fused_updates
from trainer.optimizers.options import Options, options_of
from trainer.optimizers.wrapped import load, read, wrap
from trainstep.types import OptState

Group = dict[str, Any]


@frozen(eq=False)
class Adopted:
    """A torch optimizer object as a pure optimizer.

    Attributes:
        object: the torch optimizer.
        pure: the pure optimizer with its bits.
        translated: whether the core's own kernels do the work.
        fused: the updates that the object makes inside the backward pass; None if it makes none.
        options: what the pure optimizer was built of, by group; none for an object that runs itself.
    """

    object: torch.optim.Optimizer
    pure: ts.Optimizer
    translated: bool
    _names: dict[Tensor, str]
    fused: FusedUpdates | None = None
    options: tuple[Options, ...] = ()
    _held: tuple[tuple[int, ...], ...] = ()

    def fits(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> bool:
        """Whether it is what ``adopt`` would make of ``optimizer`` now, as far as tensors go."""
        if optimizer is not self.object or names != self._names or _held(optimizer) != self._held:
            return False
        pairs = zip(self.options, optimizer.param_groups, strict=False)  # none, or all
        return not any(options.changed(group).keys() & options.fixed for options, group in pairs)

    def lacks(self, names: dict[Tensor, str]) -> list[str]:
        """Return which of ``names`` the object does not hold."""
        held = {each for group in _held(self.object) for each in group}
        return [name for parameter, name in names.items() if id(parameter) not in held]

    def attach(self, opt_state: OptState) -> OptState:
        """Join object and state; returns the state that the step is to use.

        A translated object shows the tensors of ``opt_state`` as its own: donated steps update them in
        place, so what is seen stays current. Another object is given the state.
        """
        if not self.translated:
            load(self.object, self._names, opt_state)
            return read(self.object, self._names)
        for number, group in enumerate(self.object.param_groups):
            kept = opt_state.get(f"group{number}", {})
            for parameter in group["params"]:
                name = self._names.get(parameter)
                shown = {key: values[name] for key, values in kept.items() if name in values}
                if shown:
                    self.object.state[parameter] = shown
        return opt_state

    def current(self, opt_state: OptState) -> OptState:
        """Return the state as it is after somebody else than the step has changed the object."""
        return opt_state if self.translated else read(self.object, self._names)

    def updating(self) -> AbstractContextManager[None]:
        """Return the block inside which backward passes make the updates, if that is how they are made."""
        return nullcontext() if self.fused is None else self.fused.active()


def adopt(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Adopted:
    """Find the pure optimizer for a torch optimizer object that has not made a step yet.

    Args:
        optimizer: over (some of) the parameters in ``names``.
        names: the name of every trainable parameter.

    Raises:
        ValueError: if the optimizer holds a parameter that is not among ``names``.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} was built over a parameter of shape "
                    f"{tuple(parameter.shape)} that the Trainer's model does not have. Build it from "
                    "the parameters of the model that is trained, on its final device."
                )
    fused = fused_updates(optimizer, names)
    parts = [_translate(optimizer, group) for group in optimizer.param_groups]
    if fused or any(part is None for part in parts) or _has_hooks(optimizer):
        pure = wrap(optimizer, names, fused)
        return Adopted(optimizer, pure, False, names, fused, held=_held(optimizer))
    labels = {
        names[p]: f"group{number}"
        for number, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if p in names
    }
    rules = {f"group{number}": part for number, part in enumerate(parts) if part is not None}
    if len(labels) < len(names):
        rules["untouched"] = ts.optim.freeze()
    pure = ts.optim.partition(lambda name: labels.get(name, "untouched"), rules)
    return Adopted(
        optimizer, pure, True, names, options=options_of(optimizer), held=_held(optimizer)
    )


def carried(fresh: OptState, before: OptState) -> OptState:
    """Return ``fresh``, a translated object's state, with what ``before`` has of the same parameters."""
    known = {
        (key, name): tensor
        for group in before.values()
        for key, values in group.items()
        for name, tensor in values.items()
    }
    return {
        label: {
            key: {name: known.get((key, name), tensor) for name, tensor in values.items()}
            for key, values in group.items()
        }
        for label, group in fresh.items()
    }


def _held(optimizer: torch.optim.Optimizer) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(id, group["params"])) for group in optimizer.param_groups)


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return bool(pre or post)


def _translate(optimizer: torch.optim.Optimizer, group: Group) -> ts.Optimizer | None:
    translate = _TRANSLATIONS.get(type(optimizer))
    if translate is None or group.get("differentiable") or optimizer.state:
        return None
    if any(isinstance(value, Tensor) for key, value in group.items() if key != "params"):
        return None
    if any(p.is_complex() or p.is_sparse for p in group["params"]):
        return None
    return translate(group)


def _adam(make: Callable[..., ts.Optimizer]) -> Callable[[Group], ts.Optimizer | None]:
    def translate(group: Group) -> ts.Optimizer | None:
        return make(
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            fused=bool(group["fused"]),
        )

    return translate


def _adamw_or_adam(group: Group) -> ts.Optimizer | None:
    decoupled = group.get("decoupled_weight_decay", False)
    return _adam(ts.optim.adamw if decoupled else ts.optim.adam)(group)


def _sgd(group: Group) -> ts.Optimizer | None:
    if group["fused"]:
        return None
    return ts.optim.sgd(
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _rmsprop(group: Group) -> ts.Optimizer | None:
    # On the CPU PyTorch loops over parameters unless told otherwise, and rounds differently.
    if not group["foreach"] and any(p.device.type == "cpu" for p in group["params"]):
        return None
    keys = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
    return ts.optim.rmsprop(*(group[key] for key in keys), maximize=group["maximize"])


_TRANSLATIONS: dict[type, Callable[[Group], ts.Optimizer | None]] = {
    torch.optim.AdamW: _adam(ts.optim.adamw),
    torch.optim.Adam: _adamw_or_adam,
    torch.optim.SGD: _sgd,
    torch.optim.RMSprop: _rmsprop,
}
