"""``init``: the state before the first step."""

from torch import nn

from trainstep.model import Functional
from trainstep.optim.base import Optimizer
from trainstep.rng import key as make_key
from trainstep.state import TrainState
from trainstep.types import Params


def init(
    model: nn.Module | Params, optimizer: Optimizer, seed: int = 0, *, copy: bool = True
) -> TrainState:
    """Return the state at step 0.

    Args:
        model: a module, or a dict of tensors to train.
        optimizer: the one that the step will use.
        seed: root of all randomness in training; the parameters are taken as they are.
        copy: copy the tensors; with False the state shares them with the module.

    Raises:
        ValueError: if there is nothing to train.
    """
    if isinstance(model, nn.Module):
        call = Functional(model)
        params, buffers = call.params(copy=copy), call.buffers(copy=copy)
    else:
        params = {n: p.detach().clone() if copy else p.detach() for n, p in model.items()}
        buffers = {}
    if not params:
        raise ValueError("init: the model has no parameter with requires_grad=True to train")
    return TrainState(0, params, buffers, optimizer.init(params), make_key(seed))
