"""The loss as one compiled function."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import define, evolve, field

from trainstep.graph_breaks import GraphBreaks
from trainstep.losses import ModuleLoss
from trainstep.types import LossFn

# Modes of torch.compile that replay CUDA graphs of their own, and keep outputs in their memory.
OWN_GRAPHS = ("reduce-overhead", "max-autotune")


def _warn(breaks: list[str]) -> None:
    told = "\n  ".join(breaks)
    warnings.warn(
        f"compile: the loss is compiled in several parts, with Python between, because of:\n  {told}\n"
        "compile(step, fullgraph=True) makes this an error.",
        stacklevel=3,
    )


@define(eq=False)
class Compiled:
    """A compiled function that says where it could not stay in one graph, once for every place.

    Attributes:
        compiled: what ``torch.compile`` returned.
        mode: the mode that it was given.
        tell: is given places and reasons, after the call in which they were met.
    """

    compiled: Callable[..., Any]
    mode: str | None = None
    tell: Callable[[list[str]], None] = _warn
    _breaks: GraphBreaks = field(factory=GraphBreaks, init=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Another shape of batch, or evaluation, is compiled anew, and may break where the first did not.
        before = self._breaks.mark()
        output = self.compiled(*args, **kwargs)
        if self._breaks.count != before and (met := self._breaks.met()):
            self.tell(met)
        return output

    @property
    def __wrapped__(self) -> Any:
        """What ``inspect.signature`` looks at: whether a loss takes ``train``, for instance."""
        return self.compiled


def compiled_loss(loss_fn: LossFn, *, mode: str | None = None, **options: Any) -> LossFn:
    """Return a loss function whose forward pass, and backward pass by autograd, are compiled.

    Args:
        loss_fn: made by ``module_loss``, or any pure loss.
        mode, options: of ``torch.compile``.
    """
    if isinstance(loss_fn, ModuleLoss):
        whole = partial(loss_fn.fn, loss_fn.apply.module)
        compiled = Compiled(torch.compile(whole, mode=mode, **options), mode)
        return evolve(loss_fn, compiled=compiled)
    return Compiled(torch.compile(loss_fn, mode=mode, **options), mode)


def check_graphs(loss_fn: LossFn) -> None:
    """Raise ValueError if a loss is compiled in a mode with CUDA graphs, which do not go into others."""
    compiled = loss_fn.compiled if isinstance(loss_fn, ModuleLoss) else loss_fn
    if isinstance(compiled, Compiled) and compiled.mode in OWN_GRAPHS:
        raise ValueError(
            f"capture: compile(mode={compiled.mode!r}) makes CUDA graphs of its own, which cannot be "
            "part of another one. Leave the mode out, or take 'max-autotune-no-cudagraphs'."
        )
