"""Every optimizer and wrapper by name: what tests over all optimizers draw from.

A new optimizer is added to ``OPTIMIZERS`` and is then tested by all of them. Every entry works on
parameters of any names and shapes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainstep import optim, schedules, transforms
from trainstep.optim import Optimizer

Factory = Callable[[], Optimizer]


def by_axes(name: str, param: Tensor) -> str:
    """Label a parameter by whether it has at least two axes."""
    return "matrix" if param.ndim > 1 else "rest"


def depth_of(name: str) -> int:
    """Return a depth of 0 to 2 for any name."""
    return len(name) % 3


OPTIMIZERS: dict[str, Factory] = {
    "adamw": optim.adamw,
    "adamw_foreach": lambda: optim.adamw(fused=False, amsgrad=True),
    "adam": lambda: optim.adam(weight_decay=0.1),
    "sgd": optim.sgd,
    "sgd_nesterov": lambda: optim.sgd(momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd_dampening": lambda: optim.sgd(momentum=0.9, dampening=0.1),
    "rmsprop": optim.rmsprop,
    "rmsprop_centered": lambda: optim.rmsprop(momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": optim.adagrad,
    "adagrad_decay": lambda: optim.adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
    "nadam": optim.nadam,
    "radam": lambda: optim.radam(weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda: optim.adafactor(weight_decay=0.1),
    "lion": lambda: optim.lion(weight_decay=0.1),
    "lamb": lambda: optim.lamb(weight_decay=0.1),
    "muon": lambda: optim.partition(
        optim.matrices(), {"matrix": optim.muon(), "rest": optim.adamw()}
    ),
    "schedule_free_adamw": lambda: optim.schedule_free_adamw(warmup_steps=3, weight_decay=0.1),
    "schedule_free_sgd": lambda: optim.schedule_free_sgd(lr=0.1),
    "from_torch": lambda: optim.from_torch(torch.optim.Adadelta, lr=0.1),
    "from_torch_asgd": lambda: optim.from_torch(torch.optim.ASGD, lr=0.1),
    "chain": lambda: optim.chain(transforms.clip_by_global_norm(0.5), optim.adamw()),
    "chain_noise": lambda: optim.chain(transforms.add_noise(), optim.sgd(momentum=0.9)),
    # A parameter that lacks a gradient still moves by what earlier calls collected for it.
    "chain_accumulate": lambda: optim.chain(transforms.accumulate_every(2), optim.adamw()),
    "partition": lambda: optim.partition(
        by_axes, {"matrix": optim.adamw(weight_decay=0.1), "rest": optim.sgd(momentum=0.9)}
    ),
    "masked": lambda: optim.masked(optim.adamw(), lambda name, param: param.ndim > 1),
    "freeze": optim.freeze,
    "frozen_rest": lambda: optim.partition(
        by_axes, {"matrix": optim.lion(), "rest": optim.freeze()}
    ),
    "scaled": lambda: optim.scaled(optim.adamw(), 0.1),
    "scheduled": lambda: optim.scheduled(optim.adamw(), schedules.linear(1e-2, 20, 3)),
    "layerwise_decay": lambda: optim.layerwise_decay(optim.adamw(), 0.5, depth_of),
    "lookahead": lambda: optim.lookahead(optim.adamw(), k=2),
    "ema": lambda: optim.ema(optim.adamw(), 0.9),
    "ema_warmup": lambda: optim.ema(optim.sgd(), 0.9, warmup=True, dtype=torch.float64),
    "nested": lambda: optim.ema(
        optim.partition(
            by_axes,
            {
                "matrix": optim.lookahead(
                    optim.chain(transforms.clip_by_value(0.1), optim.nadam()), k=2
                ),
                "rest": optim.scaled(optim.masked(optim.radam(), "a"), 0.5),
            },
        ),
        0.9,
    ),
}


def hyper_for(optimizer: Optimizer, lr: float = 1e-2) -> dict[str, float]:
    """Return ``{"lr": lr}`` as a step's schedule would give it, if the optimizer takes a rate."""
    return {"lr": lr} if "lr" in optimizer.accepts else {}
