"""``from_torch``: any ``torch.optim.Optimizer`` class as a pure function of its state."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.optim.base import Optimizer
from trainstep.types import Grads, Hyper, OptState, Params


def from_torch(factory: Callable[..., torch.optim.Optimizer], **options: Any) -> Optimizer:
    """Wrap an optimizer class, or a function that makes one, of PyTorch or of anybody else.

    The class runs unchanged on the tensors of the state, so the bits are its own. What it keeps per
    parameter and per group becomes part of ``opt_state``: tensors as tensors, numbers as they are.

    Args:
        factory: called as ``factory(parameters, **options)``.
        options: its keyword arguments; those that are numbers can be overridden through ``hyper``.

    Returns:
        An ``Optimizer``. Its state is complete from the start: ``init`` runs one step on zero gradients
        to learn what the class keeps, and marks it as not yet live, so that the first real step
        starts the class afresh.

    Raises:
        TypeError: if ``factory`` makes no ``torch.optim.Optimizer``, or one whose ``step`` needs a
            closure (LBFGS), which has no place in a step whose gradients are given.
    """
    name = f"from_torch({getattr(factory, '__name__', type(factory).__name__)})"

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = factory(params, **options)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optim.{name}: made a {type(optimizer).__name__}, no Optimizer")
        return optimizer

    def init(params: Params) -> OptState:
        if not params:  # an empty group of partition(); classes refuse to be made of nothing
            return {"live": {}, "state": {}, "groups": []}
        copies = {n: p.detach().clone() for n, p in params.items()}
        zero = {n: torch.zeros_like(p) for n, p in copies.items()}
        probe = make(list(copies.values()))
        _step(probe, name, copies, zero)
        return {
            "live": {n: torch.zeros((), dtype=torch.bool) for n in params},
            "state": {n: _blank(probe.state[p]) for n, p in copies.items()},
            "groups": _options_of(make(list(copies.values()))),
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        if not grads:
            return
        leaves = {n: params[n].detach() for n in grads}
        optimizer = make(list(leaves.values()))
        for group, kept in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update({**kept, **hyper})
        optimizer.state = defaultdict(
            dict, {p: dict(state["state"][n]) for n, p in leaves.items() if state["live"][n]}
        )
        _step(optimizer, name, leaves, grads)
        for n, leaf in leaves.items():
            state["state"][n] = dict(optimizer.state[leaf])
            state["live"][n].fill_(True)
        state["groups"] = _options_of(optimizer)

    # A matrix, because Muon takes nothing else.
    first = _options_of(make([torch.zeros(1, 1)]))[0]
    known = {k: v for k, v in first.items() if isinstance(v, int | float) and type(v) is not bool}
    hyper = {"lr": known["lr"]} if "lr" in known else {}
    return Optimizer(name, init, kernel, hyper, frozenset(known))


def _step(optimizer: torch.optim.Optimizer, name: str, params: Params, grads: Grads) -> None:
    for n, leaf in params.items():
        leaf.grad = grads[n].clone()  # some classes write into .grad
    try:
        with torch.enable_grad():
            optimizer.step()
    except TypeError as error:
        if "closure" in str(error):
            raise TypeError(
                f"optim.{name}: its step() needs a closure that computes the loss again. A pure "
                "step hands over gradients only; use another optimizer."
            ) from error
        raise
    finally:
        for leaf in params.values():
            leaf.grad = None


def _options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    # Some classes keep running values (weight sums, distance estimates) beside a group's options.
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _blank(kept: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tree.map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, value)
        for key, value in kept.items()
    }
