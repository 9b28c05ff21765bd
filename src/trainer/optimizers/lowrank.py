"""GaLore and APOLLO: moments of gradients that are projected to a low rank, for chosen linear layers.

GaLore: Zhao et al., 2024, arXiv 2403.03507. APOLLO: Zhu et al., 2024, arXiv 2412.05270.
"""

import inspect
import logging
import re
from typing import Any

from torch import nn

from trainer.optimizers.fused import refuse_scaling
from trainer.optimizers.layerwise import LayerwiseOptimizer
from trainer.optimizers.request import Builder, Found, Request

logger = logging.getLogger(__name__)

LAYERWISE = "_layerwise"


def galore(cls: str) -> Builder:
    """Return the builder of one of galore-torch's classes.

    As upstream, they are given a learning rate and otherwise keep their own defaults, an epsilon of
    1e-6 included.
    """

    def build(request: Request) -> Found:
        module = request.need("galore_torch", "galore-torch", "galore")
        _check_base(getattr(module, cls))
        own = {} if cls != "GaLoreAdafactor" else {"scale_parameter": False, "relative_step": False}
        return _over_targets(request, getattr(module, cls), _projection(request, scale=0.25), own)

    return build


def apollo(request: Request) -> Found:
    """Choose APOLLOAdamW. As upstream, betas and epsilon are those of the low-rank group only."""
    module = request.need("apollo_torch", "apollo-torch", "apollo")
    low_rank = {
        **_projection(request, scale=1.0),
        "proj": request.options.get("proj", str, "random"),
        "scale_type": request.options.get("scale_type", str, "channel"),
        **request.adam,
    }
    return _over_targets(request, module.APOLLOAdamW, low_rank, {})


def target_names(model: nn.Module, targets: str | list[str], optim: str) -> list[str]:
    """Return the names of the weights that are to be trained in a low rank.

    Args:
        model: whose linear layers are looked at.
        targets: ``"all-linear"``; or a regular expression that the whole name of a layer matches; or a
            list of such, and of parts of names.
        optim: for messages.

    Raises:
        ValueError: if nothing is found, or an expression is malformed.
    """
    everything = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    found = []
    for name, module in model.named_modules():
        matches = everything or _matches(targets, name)
        if matches and isinstance(module, nn.Linear):
            found.append(f"{name}.weight" if name else "weight")
        elif matches and not everything and _means(targets, name):
            logger.warning(
                "optim_target_modules: %s is a %s, and %s projects linear layers only: it is left out",
                name or "the model itself",
                type(module).__name__,
                optim,
            )
    if not found:
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        raise ValueError(
            f"optim_target_modules={targets!r} matches no linear layer of {type(model).__name__}; it "
            f"has {', '.join(linear[:8]) or 'none'}"
        )
    return found


def _check_base(cls: Any) -> None:
    """Raise ImportError for a pair of libraries with which projected weights would never move.

    galore-torch 1.0 passes arguments by their place, and bitsandbytes 0.50 has taken one of them out:
    what was meant for it becomes a limit on updates, relative to weights that are zero at that moment.
    """
    base = cls.__base__
    if base.__name__ != "Optimizer2State":
        return
    if "percentile_clipping" not in inspect.signature(base.__init__).parameters:
        raise ImportError(
            "the 8-bit class of galore-torch does not work with this version of bitsandbytes: weights in "
            "a low rank would not be updated. To install one that does: pip install 'bitsandbytes<0.50'"
        )


def _projection(request: Request, scale: float) -> dict[str, Any]:
    options = request.options
    return {
        "rank": options.get("rank", int, 128),
        "update_proj_gap": options.get("update_proj_gap", int, 200),
        "scale": options.get("scale", float, scale),
        "proj_type": options.get("proj_type", str, "std"),
    }


def _over_targets(
    request: Request, cls: Any, low_rank: dict[str, Any], own: dict[str, Any]
) -> Found:
    args, name = request.args, request.name
    layerwise = name.endswith(LAYERWISE)
    _check(args, name, layerwise)
    if request.model is None:
        return cls, own
    names = set(target_names(request.model, args.optim_target_modules, name))
    named = list(request.model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n not in names]},
        {"params": [p for n, p in named if n in names], **low_rank},
    ]
    if args.weight_decay:
        logger.warning("optim=%r has groups of its own: weight_decay is not applied", name)
    if layerwise:
        return LayerwiseOptimizer, {"params": groups, "optimizer_cls": cls, **own}
    return cls, {"params": groups, **own}


def _check(args: Any, name: str, layerwise: bool) -> None:
    if layerwise and getattr(args.parallel_mode, "value", args.parallel_mode) == "distributed":
        raise NotImplementedError(
            f"optim={name!r} updates parameters inside the backward pass, before gradients of several "
            f"processes are averaged. Use {name.removesuffix(LAYERWISE)!r}, or one process."
        )
    targets = args.optim_target_modules
    if targets is None:
        raise ValueError(
            f"optim={name!r} needs optim_target_modules: the linear layers to train in a low rank, such "
            'as "all-linear", ["attn", "mlp"], or a regular expression of whole names'
        )
    if not isinstance(targets, str | list):
        raise TypeError(
            "optim_target_modules must be a list of strings, a regular expression, or "
            f"'all-linear'; got {targets!r}"
        )
    if layerwise:
        if args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"optim={name!r} uses up each gradient as soon as it is there, so it cannot be "
                f"accumulated: set gradient_accumulation_steps=1, not {args.gradient_accumulation_steps}"
            )
        refuse_scaling(args, f"optim={name!r}")


def _matches(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return _whole(targets, name)
    return any(part in name for part in targets) or any(_whole(part, name) for part in targets)


def _means(targets: str | list[str], name: str) -> bool:
    """Whether a module is named in so many words, rather than caught by an expression."""
    return targets == name if isinstance(targets, str) else any(part in name for part in targets)


def _whole(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"optim_target_modules: {pattern!r} is not a regular expression ({error})"
        ) from error
