"""An optimizer object that runs itself, seen as a pure optimizer; and what it keeps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer.optimizers.fused import FusedUpdates, settle
from trainer.optimizers.packing import pack, place, unpack
from trainer.optimizers.schedulers import set_rate
from trainstep.types import Grads, Hyper, OptState, Params

# What an object keeps elsewhere than in ``state`` and ``param_groups``, by its class's name.
_OWN = {"AdaLomo": ("step_num", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")}
# These are the scheduler's.
_RATES = ("lr", "initial_lr")
_PLAIN = bool | int | float | str | tuple | Tensor


def wrap(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], fused: FusedUpdates | None
) -> ts.Optimizer:
    """Run the object itself. Its parameters share storage with the state's, so it moves them both.

    Where updates are made in the backward pass, all that is left to do is to look at the moments.
    """
    live = {name: parameter for parameter, name in names.items()}

    def init(params: Params) -> OptState:
        return read(optimizer, names)

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        if fused is None:
            for number, group in enumerate(optimizer.param_groups):
                set_rate(group, hyper.get(f"group{number}/lr", hyper.get("lr", group["lr"])))
            _step(optimizer, live, grads)
            for name, parameter in live.items():
                settle(parameter, params[name])
        state.clear()
        state.update(read(optimizer, names))

    rates = [f"group{number}/lr" for number in range(len(optimizer.param_groups))]
    name = type(optimizer).__name__
    accepts = frozenset(["lr", *rates])
    return ts.Optimizer(name, init, kernel, accepts=accepts, imperative=True)


def read(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> OptState:
    """Return what an object keeps; tensors are its own."""
    state = {names[p]: pack(dict(kept), names) for p, kept in optimizer.state.items() if p in names}
    groups = [
        {key: pack(value, names) for key, value in group.items() if _is_kept(key, value)}
        for group in optimizer.param_groups
    ]
    own = {key: getattr(optimizer, key) for key in _OWN.get(type(optimizer).__name__, ())}
    return {"state": state, "groups": groups, **({"own": pack(own, names)} if own else {})}


def load(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], opt_state: OptState) -> None:
    """Give an object what ``read`` returned, on the devices of its parameters."""
    live = {name: parameter for parameter, name in names.items()}
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state = defaultdict(
        dict,
        {
            live[name]: unpack(_placed(kept, live[name], group_of[live[name]]), live)
            for name, kept in opt_state["state"].items()
        },
    )
    for group, kept in zip(optimizer.param_groups, opt_state["groups"], strict=True):
        group.update(unpack(kept, live))
    device = next(iter(live.values())).device
    for key, value in opt_state.get("own", {}).items():
        setattr(optimizer, key, unpack(place(value, device), live))


def _step(optimizer: torch.optim.Optimizer, live: dict[str, Tensor], grads: Grads) -> None:
    for name, parameter in live.items():
        parameter.grad = grads.get(name)
    with torch.enable_grad():
        optimizer.step()


def _is_kept(key: str, value: Any) -> bool:
    if key in _RATES:
        return False
    if isinstance(value, dict):
        return any(isinstance(key, Tensor) for key in value)
    return isinstance(value, _PLAIN)


def _placed(kept: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    # A step counter stays on the host unless a kernel on the device reads it; as PyTorch's own loading.
    counted = group.get("capturable") or group.get("fused")
    return {
        key: value if key == "step" and not counted else place(value, parameter.device)
        for key, value in kept.items()
    }
