"""What the names in ``args.optim`` stand for: a class and its keyword options."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

Found = tuple[Any, dict[str, Any]]
Builder = Callable[[Any, dict[str, str]], Found]


def optimizer_class_and_kwargs(args: Any) -> Found:
    """Return the class (or factory) that ``args.optim`` names, and the options it is built with.

    Raises:
        ValueError: for malformed or unknown ``optim_args``, and for names without an implementation.
        ImportError: naming the package that has to be installed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    options = parse_options(args.optim_args)
    if name not in _BUILDERS:
        raise NotImplementedError(
            f"optim={name!r} is not available in this version; available are {', '.join(_BUILDERS)}"
        )
    cls, kwargs = _BUILDERS[name](args, options)
    if options:
        raise ValueError(
            f"optim_args: {name} does not take {', '.join(options)}; see the optimizer's own options"
        )
    return cls, {"lr": args.learning_rate, **kwargs}


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


def _take(options: dict[str, str], **kinds: Callable[[str], Any]) -> dict[str, Any]:
    """Take the options that are named out of the text's, converted."""
    return {key: kind(options.pop(key)) for key, kind in kinds.items() if key in options}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"optim_args: expected True or False, got {text!r}")
    return text.lower() in ("true", "1")


def _adam_options(args: Any) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _need(module: str, package: str, optim: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"optim={optim!r} needs {package}: pip install {package}") from error


def _adamw(args: Any, options: dict[str, str], **fixed: Any) -> Found:
    return torch.optim.AdamW, {**_adam_options(args), **fixed}


def _sgd(args: Any, options: dict[str, str]) -> Found:
    known = _take(options, momentum=float, dampening=float, weight_decay=float, nesterov=_truth)
    return torch.optim.SGD, known


def _adagrad(args: Any, options: dict[str, str]) -> Found:
    return torch.optim.Adagrad, _take(options, lr_decay=float, weight_decay=float, eps=float)


def _rmsprop(args: Any, options: dict[str, str]) -> Found:
    known = _take(
        options, momentum=float, alpha=float, eps=float, weight_decay=float, centered=_truth
    )
    return torch.optim.RMSprop, known


def _adafactor(args: Any, options: dict[str, str]) -> Found:
    module = _need("transformers.optimization", "transformers", "adafactor")
    return module.Adafactor, {"scale_parameter": False, "relative_step": False}


def _stable_adamw(args: Any, options: dict[str, str]) -> Found:
    module = _need("optimi", "torch-optimi", "stable_adamw")
    known = _take(options, decouple_lr=_truth, max_lr=float, kahan_sum=_truth, weight_decay=float)
    return module.StableAdamW, {**_adam_options(args), **known}


def _schedule_free(kind: str) -> Builder:
    def build(args: Any, options: dict[str, str]) -> Found:
        module = _need("schedulefree", "schedulefree", f"schedule_free_{kind.lower()}")
        kwargs = {
            "weight_decay": args.weight_decay,
            "weight_lr_power": 2.0,
            "r": 0.0,
            **_take(options, weight_lr_power=float, r=float),
        }
        if kind != "RAdam":
            kwargs["warmup_steps"] = args.get_warmup_steps(max(args.max_steps, 1))
        if kind == "SGD":
            return module.SGDScheduleFree, kwargs
        cls = module.RAdamScheduleFree if kind == "RAdam" else module.AdamWScheduleFree
        return cls, {**_adam_options(args), **kwargs}

    return build


def _grokadamw(args: Any, options: dict[str, str]) -> Found:
    module = _need("grokadamw", "grokadamw", "grokadamw")
    defaults = {
        "alpha_init": 0.98,
        "lamb": 2.0,
        "gamma": 0.1,
        "grokking_signal_decay_rate": 0.1,
        "gradient_clipping": 1.0,
    }
    return module.GrokAdamW, {
        **_adam_options(args),
        **defaults,
        **_take(options, **dict.fromkeys(defaults, float)),
    }


def _bitsandbytes(cls: str, bits: int, paged: bool) -> Builder:
    def build(args: Any, options: dict[str, str]) -> Found:
        module = _need("bitsandbytes.optim", "bitsandbytes", str(args.optim))
        kwargs: dict[str, Any] = {"optim_bits": bits}
        if cls != "RMSprop":
            kwargs["is_paged"] = paged
        if cls in ("AdamW", "AdEMAMix"):
            kwargs |= _adam_options(args)
        if cls == "Lion":
            kwargs["betas"] = (args.adam_beta1, args.adam_beta2)
        if cls == "AdEMAMix":
            beta3 = float(options.pop("beta3", 0.9999))
            kwargs["betas"] = (args.adam_beta1, args.adam_beta2, beta3)
            kwargs["alpha"] = float(options.pop("alpha", 5.0))
            kwargs |= _take(options, t_alpha=int, t_beta3=int)
        return getattr(module, cls), kwargs

    return build


def _torchao(cls: str) -> Builder:
    def build(args: Any, options: dict[str, str]) -> Found:
        module = _need("torchao.optim", "torchao", str(args.optim))
        block = int(options.pop("block_size", 256))
        rounding = _truth(options.pop("bf16_stochastic_round", "False"))
        extra = {"block_size": block, "bf16_stochastic_round": rounding}
        return getattr(module, cls), {**_adam_options(args), **extra}

    return build


_BUILDERS: dict[str, Builder] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": lambda args, options: _adamw(args, options, fused=True),
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
    "stable_adamw": _stable_adamw,
    "schedule_free_adamw": _schedule_free("AdamW"),
    "schedule_free_sgd": _schedule_free("SGD"),
    "schedule_free_radam": _schedule_free("RAdam"),
    "grokadamw": _grokadamw,
    "adamw_torch_4bit": _torchao("AdamW4bit"),
    "adamw_torch_8bit": _torchao("AdamW8bit"),
    "adamw_bnb_8bit": _bitsandbytes("AdamW", 8, False),
    "adamw_8bit": _bitsandbytes("AdamW", 8, False),
    "paged_adamw_32bit": _bitsandbytes("AdamW", 32, True),
    "paged_adamw_8bit": _bitsandbytes("AdamW", 8, True),
    "lion_8bit": _bitsandbytes("Lion", 8, False),
    "lion_32bit": _bitsandbytes("Lion", 32, False),
    "paged_lion_8bit": _bitsandbytes("Lion", 8, True),
    "paged_lion_32bit": _bitsandbytes("Lion", 32, True),
    "ademamix": _bitsandbytes("AdEMAMix", 32, False),
    "ademamix_8bit": _bitsandbytes("AdEMAMix", 8, False),
    "paged_ademamix_32bit": _bitsandbytes("AdEMAMix", 32, True),
    "paged_ademamix_8bit": _bitsandbytes("AdEMAMix", 8, True),
    "rmsprop_bnb": _bitsandbytes("RMSprop", 32, False),
    "rmsprop_bnb_8bit": _bitsandbytes("RMSprop", 8, False),
    "rmsprop_bnb_32bit": _bitsandbytes("RMSprop", 32, False),
}
