"""``chain``: gradient transformations and the optimizer that they feed, as one optimizer."""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.optim.algebra import hyper_of
from trainstep.optim.base import Optimizer
from trainstep.rng import key as make_key
from trainstep.transforms import Context, Transform
from trainstep.types import Grads, Hyper, OptState, Params


def chain(*parts: Transform | Optimizer, seed: int = 0) -> Optimizer:
    """Run parts in order: a transform changes the gradients that the parts after it see.

    Where ``make_step(transforms=...)`` transforms the gradients of all parameters, a chain is an optimizer
    and can stand in a ``partition``, so that each group is clipped by itself, say.

    Args:
        parts: transforms and optimizers, an optimizer last. With several optimizers, each updates the
            parameters in turn, from the gradients as they are at its place.
        seed: of the randomness of transforms, which is a function of the seed, of how many updates the
            chain made, and of the transform's place. ``accumulate_every`` holds the parts after it.

    Returns:
        An ``Optimizer``. Hyperparameters go to every optimizer that has them; with one optimizer, they and
        their defaults are its own.

    Raises:
        ValueError: if the last part is no optimizer, since transforms after it would do nothing.
        TypeError: for a part that is neither.
    """
    for part in parts:
        if not isinstance(part, Transform | Optimizer):
            kind = getattr(part, "__name__", type(part).__name__)
            raise TypeError(f"optim.chain: a part must be a Transform or an Optimizer, got {kind}")
    names = [f"{i}_{part.name}" for i, part in enumerate(parts)]
    optimizers = [part for part in parts if isinstance(part, Optimizer)]
    if not parts or not isinstance(parts[-1], Optimizer):
        raise ValueError(
            f"optim.chain: the last part must be an optimizer, got {', '.join(names) or 'nothing'}"
        )
    transforms = [part for part in parts if isinstance(part, Transform)]
    # A count is kept only for transforms that ask for one: it would keep a step from being recorded.
    counted = any(transform.period != 1 for transform in transforms)
    root = make_key(seed)

    def init(params: Params) -> OptState:
        count = {"step": torch.zeros((), dtype=torch.int64)} if counted else {}
        return count | {name: part.init(params) for name, part in zip(names, parts, strict=True)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        if not grads:
            return
        context = Context(owned=True, donated=True)
        if counted:
            context.step = int(state["step"])  # on the CPU
            state["step"].add_(1)
        if transforms:
            grads = tree.clone(grads)  # once; they are the chain's own from here on
        for place, (name, part) in enumerate(zip(names, parts, strict=True)):
            if isinstance(part, Optimizer):
                part.kernel(params, grads, state[name], hyper_of(part, hyper))
                continue
            context.key = root.fold_in(context.step, place)
            grads, after = part.update(grads, state[name], params, context)
            state[name] = tree.map(_stored, state[name], after)
            if not grads:  # held, see transforms.accumulate_every
                return

    inside = ", ".join(part.name for part in parts)
    hyper = optimizers[0].hyper if len(optimizers) == 1 else {}
    accepts = frozenset().union(*(optimizer.accepts for optimizer in optimizers))
    return Optimizer(f"chain({inside})", init, kernel, hyper, accepts)


def _stored(old: Any, new: Any) -> Any:
    """Keep the state's own tensors: a kernel works in place."""
    return old.copy_(new) if isinstance(old, Tensor) and old is not new else new
