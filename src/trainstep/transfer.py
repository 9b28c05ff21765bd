"""Taking a state elsewhere: back into a module, or to another device."""

from typing import Any

import torch
from torch import Tensor, nn

from trainstep import tree
from trainstep.model import Functional
from trainstep.state import TrainState
from trainstep.types import Buffers, Params


def load_into(
    module: nn.Module, state: TrainState | Params, buffers: Buffers | None = None
) -> nn.Module:
    """Write parameters and buffers into a module, in place; its ``state_dict`` then holds them.

    The module's tensors stay the objects that they are, so optimizers and hooks that hold them see the
    new values; tied weights are written once, under their first name. Values are converted to the dtype
    and device of the module's tensors, as ``load_state_dict`` does. Nothing is written if an error is
    raised, and nothing is shared with the state afterwards.

    Args:
        module: the model, or another of the same structure. Which of its parameters are frozen does not
            matter.
        state: a ``TrainState``, or trainable parameters by name, such as ``optim.ema_params(state)``.
        buffers: with parameters, the buffers and frozen parameters; None leaves those of the module as they
            are.

    Returns:
        The module.

    Raises:
        ValueError: naming tensors that are missing, unexpected or of another shape; for a stacked state;
            for buffers beside a ``TrainState``, which has its own.
        TypeError: if ``module`` is no module.
    """
    call = Functional(module)
    if isinstance(state, TrainState):
        if buffers is not None:
            raise ValueError(
                "load_into: a TrainState brings its buffers; to give others, give its parameters: "
                "load_into(module, state.params, buffers)"
            )
        given, whole = {**state.params, **state.buffers}, True
    else:
        given, whole = {**state, **(buffers or {})}, buffers is not None
    own = call.params(copy=False) | call.buffers(copy=False)
    problems = _problems(given, own, own if whole else call.params(copy=False))
    if problems:
        raise ValueError(
            f"load_into: the tensors do not fit {type(module).__name__}:\n  "
            + "\n  ".join(problems)
            + "\nA state of several members is taken apart with trainstep.vmap.unstack(state)."
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    return module


def to_device(state: Any, device: torch.device | str | int) -> Any:
    """Return a state, or any tree, with every tensor on ``device``; other leaves stay as they are.

    Tensors that are there already are shared with the result, as with ``Tensor.to``: of two such states,
    donate only one. Counters that some optimizers keep on the CPU move too and then cost a host read per
    update; to avoid that, move the module before ``init``.
    """
    return tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state)


def _problems(
    given: dict[str, Tensor], own: dict[str, Tensor], wanted: dict[str, Tensor]
) -> list[str]:
    problems = [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"unexpected: {name}" for name in given if name not in own]
    problems += [
        f"differs: {name} has shape {tuple(tensor.shape)}, the module's {tuple(own[name].shape)}"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    return problems
