"""The optimizer contract: one in-place kernel, used pure (on copies) or donated (on the originals)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import Factory, field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.types import Grads, Hyper, OptState, Params

Kernel = Callable[[Params, Grads, OptState, Hyper], None]
"""Updates ``params`` and ``opt_state`` in place; may overwrite ``grads``' values only if documented."""


@frozen(eq=False)
class Optimizer:
    """An optimizer as a pair of functions over dicts of tensors.

    Attributes:
        name: for messages.
        init: ``init(params) -> opt_state``: every tensor it will ever need, zero-filled.
        kernel: updates parameters and state in place, under ``torch.no_grad``. Parameters without a
            gradient are left alone, as ``torch.optim`` does.
        hyper: default hyperparameters; ``lr`` is used where the step has no schedule.
        accepts: names that ``apply`` takes in its ``hyper``.
        imperative: the kernel moves tensors of its own that the given ones share storage with, whatever it
            is given, so a step that may refuse the update has to ask the host first.
        capturable: the kernel reads hyperparameters from device tensors and asks the host nothing, so a
            CUDA graph can hold it.
    """

    name: str
    init: Callable[[Params], OptState]
    kernel: Kernel = field(repr=False)
    hyper: Mapping[str, Any] = field(factory=dict)
    accepts: frozenset[str] = field(
        default=Factory(lambda self: frozenset(self.hyper), takes_self=True), repr=False
    )
    imperative: bool = field(default=False, kw_only=True)
    capturable: bool = field(default=False, kw_only=True)

    def apply(
        self,
        params: Params,
        grads: Grads,
        opt_state: OptState,
        hyper: Hyper | None = None,
        donate: bool = False,
    ) -> tuple[Params, OptState]:
        """Return updated ``(params, opt_state)``.

        Args:
            params: tensors by name.
            grads: gradients by name, same shapes; names may be missing. Never written to.
            opt_state: what ``init`` or the previous ``apply`` returned.
            hyper: overrides of the default hyperparameters, such as ``{"lr": 3e-4}``.
            donate: update the given tensors in place and return them. The bits are the same.

        Raises:
            ValueError: if ``grads`` or ``hyper`` has a name that is not known, or if the optimizer fails on
                an ``opt_state`` that is not like the one that ``init`` makes.
        """
        if hyper and not self.accepts >= hyper.keys():
            raise ValueError(_unknown(self.name, "hyperparameter", hyper, self.accepts))
        merged = {**self.hyper, **hyper} if hyper else self.hyper
        if not params.keys() >= grads.keys():
            raise ValueError(_unknown(self.name, "gradient", grads, params))
        if not donate:
            params, opt_state = tree.clone(params), tree.clone(opt_state)
        try:
            with torch.no_grad():
                self.kernel(params, grads, opt_state, merged)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            problem = _misfit(opt_state, self.init(params))
            if problem is None:
                raise
            raise ValueError(
                f"optim.{self.name}: opt_state was made for another optimizer or other parameters: "
                f"{problem}. Start with {self.name}'s own init(params)."
            ) from error
        return params, opt_state


def zeros(params: Params) -> dict[str, Tensor]:
    """Return one zero tensor per parameter, with its shape, dtype, device and strides."""
    return {n: torch.zeros_like(p, memory_format=torch.preserve_format) for n, p in params.items()}


def counters(params: Params, *, on_device: bool) -> dict[str, Tensor]:
    """Return a float32 step counter (zero-dimensional) per parameter, as ``torch.optim`` keeps them."""
    return {
        n: torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
        for n, p in params.items()
    }


def groups(params: Params, names: Any) -> list[list[str]]:
    """Split parameter names into runs of one device and dtype, which multi-tensor kernels need."""
    names = list(names)
    if not names:
        return []
    first = params[names[0]]
    device, dtype = first.device, first.dtype
    if all(params[n].dtype == dtype and params[n].device == device for n in names):
        return [names]
    runs: dict[Any, list[str]] = {}
    for name in names:
        runs.setdefault((params[name].device, params[name].dtype), []).append(name)
    return list(runs.values())


def pick(tensors: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    """Return the tensors of ``names`` as a list."""
    return [tensors[n] for n in names]


def check_range(name: str, what: str, value: float, low: float, high: float | None = None) -> None:
    """Raise ValueError unless ``low <= value`` (and ``value < high``), TypeError for a schedule."""
    if isinstance(value, Tensor):  # reading it would sync the device
        return
    if callable(value):
        raise TypeError(
            f"optim.{name}: {what} must be a number, got a function. Give a schedule to the step, "
            "make_step(..., schedule=schedule), or to this optimizer alone, "
            f"optim.scheduled(optim.{name}(), schedule)."
        )
    if not low <= value or (high is not None and not value < high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"optim.{name}: {what} must be {bound}, got {value}")


def _misfit(given: Any, own: Any, path: str = "opt_state") -> str | None:
    """Say where a state's records have other names than they should; None if nowhere."""
    if not isinstance(own, dict) or (isinstance(given, dict) and "groups" in given.keys() & own):
        return None  # a wrapped class decides itself what it keeps, and when; see from_torch
    if not isinstance(given, dict):
        return f"{path} is a {type(given).__name__}"
    missing, extra = [n for n in own if n not in given], [n for n in given if n not in own]
    if missing or extra:
        lacks = f"lacks {', '.join(map(str, missing[:4]))}" if missing else ""
        has = f"has unexpected {', '.join(map(str, extra[:4]))}" if extra else ""
        return f"{path} {' and '.join(filter(None, (lacks, has)))}"
    found = (_misfit(given[name], own[name], f"{path}/{name}") for name in own)
    return next(filter(None, found), None)


def _unknown(name: str, what: str, given: Any, known: Any) -> str:
    extra = ", ".join(sorted(set(given) - set(known)))
    return f"optim.{name}: unknown {what} {extra}; known: {', '.join(sorted(known)[:12])}"
