"""From training arguments to a pure optimizer, a schedule and gradient transforms."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

import trainstep as ts
from trainstep.types import Schedule

# A name that matches is not decayed; tested against the lower-cased dotted name.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that weight decay applies to.

    Left out are all parameters of ``nn.LayerNorm`` modules, and those whose name says bias or norm.
    """
    inside_norm = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [
        name
        for name, _ in model.named_parameters()
        if name not in inside_norm and not _NO_DECAY.search(name.lower())
    ]


def check_choices(args: Any) -> None:
    """Raise what building the optimizer and the schedule would raise, before any work is lost."""
    make_optimizer(args, set())
    make_schedule(args, max(args.max_steps, 1))


def make_optimizer(args: Any, decayed: set[str]) -> ts.Optimizer:
    """Build the optimizer that ``args.optim`` names, with a decayed and an undecayed group."""
    name = _value(args.optim)
    if name not in _OPTIMIZERS:
        raise NotImplementedError(
            f"optim={name!r} is not available yet; choose one of {', '.join(_OPTIMIZERS)}"
        )
    build = _OPTIMIZERS[name]
    options = parse_options(args.optim_args)
    return ts.optim.partition(
        lambda parameter: "decay" if parameter in decayed else "no_decay",
        {
            "decay": build(args, args.weight_decay, options),
            "no_decay": build(args, 0.0, options),
        },
    )


def make_schedule(args: Any, max_steps: int) -> Schedule:
    """Build the learning rate as a function of the step, for a run of ``max_steps`` updates."""
    name = _value(args.lr_scheduler_type)
    if name not in _SCHEDULES:
        raise NotImplementedError(
            f"lr_scheduler_type={name!r} is not available yet; choose one of "
            f"{', '.join(_SCHEDULES)}"
        )
    if max_steps == 0:  # the loop looks at the limit after an update: that one must change nothing
        return ts.schedules.constant(0.0)
    options = dict(args.lr_scheduler_kwargs or {})
    warmup = args.get_warmup_steps(max_steps)
    return _SCHEDULES[name](args.learning_rate, max_steps, warmup, options)


def make_transforms(args: Any) -> tuple[ts.Transform, ...]:
    """Build the gradient transforms: clipping, unless ``max_grad_norm`` is 0 or None."""
    if not args.max_grad_norm or args.max_grad_norm <= 0:
        return ()
    return (ts.transforms.clip_by_global_norm(args.max_grad_norm),)


def parse_options(text: str | None) -> dict[str, str]:
    """Parse ``"momentum=0.9, nesterov=True"`` into a dict of strings.

    Raises:
        ValueError: naming a part without ``=``.
    """
    options = {}
    for part in (text or "").replace(" ", "").split(","):
        if part:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"optim_args: expected key=value, got {part!r} in {text!r}")
            options[key] = value
    return options


def _adamw(args: Any, decay: float, options: dict[str, str], *, fused: bool) -> ts.Optimizer:
    _refuse_unknown("adamw", options, ())
    return ts.optim.adamw(
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        decay,
        fused=fused,
    )


def _sgd(args: Any, decay: float, options: dict[str, str]) -> ts.Optimizer:
    _refuse_unknown("sgd", options, ("momentum", "dampening", "nesterov", "weight_decay"))
    return ts.optim.sgd(
        args.learning_rate,
        momentum=float(options.get("momentum", 0.0)),
        dampening=float(options.get("dampening", 0.0)),
        weight_decay=decay,
        nesterov=options.get("nesterov", "False").lower() in ("true", "1"),
    )


def _refuse_unknown(name: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"optim_args: {name} does not take {', '.join(unknown)}; "
            f"it takes {', '.join(known) or 'nothing'}"
        )


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


_OPTIMIZERS: dict[str, Callable[[Any, float, dict[str, str]], ts.Optimizer]] = {
    "adamw_torch_fused": lambda a, d, o: _adamw(a, d, o, fused=True),
    "adamw_torch": lambda a, d, o: _adamw(a, d, o, fused=False),
    "sgd": _sgd,
}

_SCHEDULES: dict[str, Callable[[float, int, int, dict[str, Any]], Schedule]] = {
    "linear": lambda lr, total, warmup, o: ts.schedules.linear(lr, total, warmup, **o),
    "cosine": lambda lr, total, warmup, o: ts.schedules.cosine(lr, total, warmup, **o),
    "constant": lambda lr, total, warmup, o: ts.schedules.constant(lr),
    "constant_with_warmup": lambda lr, total, warmup, o: ts.schedules.constant(lr, warmup),
}
