"""The loss as one compiled function."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import define, evolve

from trainstep.losses import ModuleLoss
from trainstep.types import LossFn


@define(eq=False)
class Compiled:
    """A compiled function that says once where it could not stay in one graph."""

    compiled: Callable[..., Any]
    _told: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._told:
            return self.compiled(*args, **kwargs)
        self._told = True
        breaks = _graph_breaks()
        before = dict(breaks)
        output = self.compiled(*args, **kwargs)
        reasons = [reason for reason, count in breaks.items() if count > before.get(reason, 0)]
        if reasons:
            told = "\n  ".join(" ".join(reason.split())[:300] for reason in reasons)
            warnings.warn(
                "compile: the loss is compiled in several parts, with Python between, because of:\n  "
                f"{told}\ncompile(step, fullgraph=True) makes this an error and says where.",
                stacklevel=2,
            )
        return output


def compiled_loss(loss_fn: LossFn, **options: Any) -> LossFn:
    """Return a loss function whose forward pass, and backward pass by autograd, are compiled.

    Args:
        loss_fn: made by ``module_loss``, or any pure loss.
        options: of ``torch.compile``.
    """
    if isinstance(loss_fn, ModuleLoss):
        whole = partial(loss_fn.fn, loss_fn.apply.module)
        return evolve(loss_fn, compiled=Compiled(torch.compile(whole, **options)))
    return Compiled(torch.compile(loss_fn, **options))


def _graph_breaks() -> Any:
    from torch._dynamo.utils import counters

    return counters["graph_break"]
