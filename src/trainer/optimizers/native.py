"""The names that stand for PyTorch's own classes."""

from typing import Any

import torch

from trainer.optimizers.request import Builder, Found, Request, truth


def adamw(**fixed: Any) -> Builder:
    """Return the builder of AdamW with fixed options."""

    def build(request: Request) -> Found:
        return torch.optim.AdamW, {**request.adam, **fixed}

    return build


def sgd(request: Request) -> Found:
    """Choose SGD, with momentum and the like from ``optim_args``."""
    kinds = {"momentum": float, "dampening": float, "weight_decay": float}
    return torch.optim.SGD, request.options.take(**kinds, nesterov=truth)


def adagrad(request: Request) -> Found:
    """Choose Adagrad."""
    return torch.optim.Adagrad, request.options.take(lr_decay=float, weight_decay=float, eps=float)


def rmsprop(request: Request) -> Found:
    """Choose RMSprop."""
    kinds = {"momentum": float, "alpha": float, "eps": float, "weight_decay": float}
    return torch.optim.RMSprop, request.options.take(**kinds, centered=truth)
