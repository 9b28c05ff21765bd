"""bitsandbytes: optimizers whose moments have 8 bits, or live in memory that is paged to the host."""

import importlib
import logging
from typing import Any

from torch import nn

from trainer.optimizers.request import Builder, Found, Request, truth

logger = logging.getLogger(__name__)


def bitsandbytes(cls: str, bits: int, paged: bool = False) -> Builder:
    """Return the builder of one of its classes."""

    def build(request: Request) -> Found:
        module = request.need("bitsandbytes.optim", "bitsandbytes", "bitsandbytes")
        kwargs = _OPTIONS[cls](request)
        if cls != "RMSprop":
            kwargs["is_paged"] = paged
        return getattr(module, cls), {**kwargs, "optim_bits": bits}

    return build


def keep_embeddings_wide(cls: Any, kwargs: dict[str, Any], model: nn.Module) -> None:
    """Let an 8-bit optimizer keep the moments of embeddings in 32 bits, where 8 are too coarse.

    Does nothing for other classes. The library keeps the list for the whole process, and looks at it
    when an optimizer makes its first step.
    """
    if not cls.__module__.startswith("bitsandbytes") or kwargs.get("optim_bits") != 8:
        return
    manager = importlib.import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
            count += module.weight.numel()
    logger.info("%s: %d numbers of embeddings keep moments of 32 bits", cls.__name__, count)


def _adamw(request: Request) -> dict[str, Any]:
    return request.adam


def _lion(request: Request) -> dict[str, Any]:
    return {"betas": request.adam["betas"]}


def _rmsprop(request: Request) -> dict[str, Any]:
    kinds = {"alpha": float, "eps": float, "weight_decay": float, "momentum": float}
    return request.options.take(**kinds, centered=truth, min_8bit_size=int)


def _ademamix(request: Request) -> dict[str, Any]:
    args, options = request.args, request.options
    return {
        "betas": (
            options.get("beta1", float, args.adam_beta1),
            options.get("beta2", float, args.adam_beta2),
            options.get("beta3", float, 0.9999),
        ),
        "alpha": options.get("alpha", float, 5.0),
        "eps": options.get("eps", float, args.adam_epsilon),
        **options.take(t_alpha=int, t_beta3=int),
    }


_OPTIONS = {"AdamW": _adamw, "Lion": _lion, "RMSprop": _rmsprop, "AdEMAMix": _ademamix}
