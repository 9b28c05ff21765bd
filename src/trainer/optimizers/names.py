"""What the names in ``args.optim`` stand for: a class and its keyword options."""

from typing import Any

from torch import nn

from trainer.optimizers.bnb import bitsandbytes
from trainer.optimizers.libraries import (
    adafactor,
    anyprecision,
    grokadamw,
    schedule_free,
    stable_adamw,
    torchao,
    vendor,
)
from trainer.optimizers.lomo import lomo
from trainer.optimizers.lowrank import apollo, galore
from trainer.optimizers.native import adagrad, adamw, rmsprop, sgd
from trainer.optimizers.request import Builder, Found, Options, Request

_NEED_MODEL = ("galore_", "apollo_", "lomo", "adalomo")


def optimizer_class_and_kwargs(args: Any, model: nn.Module | None = None) -> Found:
    """Return the class that ``args.optim`` names, and the options it is built with.

    Options named ``params`` or ``model`` are to replace the usual parameter groups.

    Raises:
        ValueError: for malformed or unknown ``optim_args``, and for arguments that the optimizer cannot
            work with, a missing model among them.
        TypeError: for ``optim_target_modules`` of another type.
        NotImplementedError: for an optimizer that cannot be distributed in a distributed training.
        ImportError: naming the package that has to be installed.
    """
    found = check_optimizer(args, model)
    name = _name(args)
    if model is None and name.startswith(_NEED_MODEL):
        raise ValueError(f"optim={name!r} is built over the model: pass it, too")
    return found


def check_optimizer(args: Any, model: nn.Module | None = None) -> Found:
    """Do the same, and without a model leave out what needs one: to see what is wrong early."""
    name = _name(args)
    if name not in _BUILDERS:
        raise ValueError(f"optim={name!r} is not known; choose one of {', '.join(_BUILDERS)}")
    request = Request(name, args, Options.parse(args.optim_args), model)
    cls, kwargs = _BUILDERS[name](request)
    request.options.finish(name)
    return cls, {"lr": args.learning_rate, **kwargs}


def _name(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


_BUILDERS: dict[str, Builder] = {
    "adamw_torch": adamw(),
    "adamw_torch_fused": adamw(fused=True),
    "adamw_torch_xla": vendor("torch_xla.amp.syncfree", "AdamW", "torch_xla"),
    "adamw_torch_npu_fused": vendor("torch_npu.optim", "NpuFusedAdamW", "torch_npu"),
    "adamw_apex_fused": vendor("apex.optimizers", "FusedAdam", "apex (NVIDIA's)"),
    "adafactor": adafactor,
    "adamw_anyprecision": anyprecision,
    "adamw_torch_4bit": torchao("AdamW4bit"),
    "adamw_torch_8bit": torchao("AdamW8bit"),
    "ademamix": bitsandbytes("AdEMAMix", 32),
    "sgd": sgd,
    "adagrad": adagrad,
    "adamw_bnb_8bit": bitsandbytes("AdamW", 8),
    "adamw_8bit": bitsandbytes("AdamW", 8),
    "ademamix_8bit": bitsandbytes("AdEMAMix", 8),
    "lion_8bit": bitsandbytes("Lion", 8),
    "lion_32bit": bitsandbytes("Lion", 32),
    "paged_adamw_32bit": bitsandbytes("AdamW", 32, paged=True),
    "paged_adamw_8bit": bitsandbytes("AdamW", 8, paged=True),
    "paged_ademamix_32bit": bitsandbytes("AdEMAMix", 32, paged=True),
    "paged_ademamix_8bit": bitsandbytes("AdEMAMix", 8, paged=True),
    "paged_lion_32bit": bitsandbytes("Lion", 32, paged=True),
    "paged_lion_8bit": bitsandbytes("Lion", 8, paged=True),
    "rmsprop": rmsprop,
    "rmsprop_bnb": bitsandbytes("RMSprop", 32),
    "rmsprop_bnb_8bit": bitsandbytes("RMSprop", 8),
    "rmsprop_bnb_32bit": bitsandbytes("RMSprop", 32),
    "galore_adamw": galore("GaLoreAdamW"),
    "galore_adamw_8bit": galore("GaLoreAdamW8bit"),
    "galore_adafactor": galore("GaLoreAdafactor"),
    "galore_adamw_layerwise": galore("GaLoreAdamW"),
    "galore_adamw_8bit_layerwise": galore("GaLoreAdamW8bit"),
    "galore_adafactor_layerwise": galore("GaLoreAdafactor"),
    "lomo": lomo("Lomo"),
    "adalomo": lomo("AdaLomo"),
    "grokadamw": grokadamw,
    "schedule_free_radam": schedule_free("RAdam"),
    "schedule_free_adamw": schedule_free("AdamW"),
    "schedule_free_sgd": schedule_free("SGD"),
    "apollo_adamw": apollo,
    "apollo_adamw_layerwise": apollo,
    "stable_adamw": stable_adamw,
}
