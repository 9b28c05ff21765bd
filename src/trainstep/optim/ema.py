"""``ema``: an exponential moving average of the parameters, kept beside the optimizer's own state."""

import torch

from trainstep.optim.base import Optimizer, check_range, counters, groups, pick
from trainstep.optim.multi import tick
from trainstep.optim.nodes import Source, find_nodes, unpack
from trainstep.types import Grads, Hyper, OptState, Params


def ema(
    optimizer: Optimizer,
    decay: float = 0.999,
    *,
    warmup: bool = False,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Keep ``average = decay * average + (1 - decay) * params`` after every update.

    The average starts at the initial parameters (Polyak and Juditsky, 1992; the bits are those of
    ``torch.optim.swa_utils.get_ema_multi_avg_fn``). Training does not see it; evaluate on it with
    ``evaluate(state.evolve(params=ema_params(state)), batch)``.

    Args:
        optimizer: makes the updates, unchanged.
        decay: in [0, 1).
        warmup: use ``min(decay, (1 + t) / (10 + t))`` at the t-th update, counted from 0 per parameter, so
            that the start is forgotten sooner.
        dtype: of the average; None for that of each parameter. float32 for bfloat16 parameters, whose
            rounding would swallow steps as small as ``1 - decay``.

    Returns:
        An ``Optimizer`` with the hyperparameters of the inner one. A parameter without a gradient is left
        alone, and so is its average.

    Raises:
        ValueError: for a decay out of range.
    """
    check_range("ema", "decay", decay, 0.0, 1.0)

    def init(params: Params) -> OptState:
        average = {n: p.detach().to(dtype or p.dtype, copy=True) for n, p in params.items()}
        counts = {"step": counters(params, on_device=False)} if warmup else {}
        return {"ema": {"average": average, **counts}, "optimizer": optimizer.init(params)}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        optimizer.kernel(params, grads, state["optimizer"], hyper)
        node = state["ema"]
        for names in groups(params, grads):
            averages = pick(node["average"], names)
            current = [p.to(a.dtype) for p, a in zip(pick(params, names), averages, strict=True)]
            if warmup:
                steps = tick(pick(node["step"], names))  # counts this one: t is one less
                torch._foreach_lerp_(
                    averages, current, [1 - min(decay, t / (9 + t)) for t in steps]
                )
            else:
                torch._foreach_lerp_(averages, current, 1 - decay)

    name = f"ema({optimizer.name})"
    capturable = optimizer.capturable and not warmup
    return Optimizer(name, init, kernel, optimizer.hyper, optimizer.accepts, capturable=capturable)


def ema_params(state: Source, params: Params | None = None) -> Params:
    """Return the averaged parameters, wherever in the optimizer's state ``ema`` keeps them.

    Args:
        state: a ``TrainState``, or an ``opt_state``.
        params: the parameters that go with a bare ``opt_state``.

    Returns:
        A dict with an average for every parameter that has one, in the parameter's dtype, and the others
        as they are. Without parameters, the averages alone as they are kept. Tensors of the state
        may be shared.

    Raises:
        ValueError: if no ``ema`` made the state.
    """
    opt_state, known = unpack("ema_params", state, params, needed=False)
    nodes = find_nodes(opt_state, "ema")
    if not nodes:
        raise ValueError(
            "optim.ema_params: the state has no average; wrap the optimizer: optim.ema(optimizer)"
        )
    averages = {n: average for node in nodes for n, average in node["average"].items()}
    if not known:
        return averages
    return {n: averages[n].to(p.dtype) if n in averages else p for n, p in known.items()}
