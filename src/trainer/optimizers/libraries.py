"""The names that stand for a class of some library, built over the usual two groups."""

import torch

from trainer.optimizers.request import Builder, Found, Request, dtype, truth


def adafactor(request: Request) -> Found:
    """Choose transformers' Adafactor, with a learning rate from outside."""
    module = request.need("transformers.optimization", "transformers", "hf")
    return module.Adafactor, {"scale_parameter": False, "relative_step": False}


def stable_adamw(request: Request) -> Found:
    """Choose StableAdamW of torch-optimi."""
    module = request.need("optimi", "torch-optimi", "optimi")
    options = request.options
    return module.StableAdamW, {
        **request.adam,
        "weight_decay": request.args.weight_decay,
        "decouple_lr": options.get("decouple_lr", truth, False),
        "max_lr": options.get("max_lr", float, None),
        "kahan_sum": options.get("kahan_sum", truth, None),
    }


def schedule_free(kind: str) -> Builder:
    """Return the builder of one of schedulefree's classes, by the first part of its name."""

    def build(request: Request) -> Found:
        module = request.need("schedulefree", "schedulefree", "schedulefree")
        args, options = request.args, request.options
        kwargs = {
            "weight_decay": args.weight_decay,
            "weight_lr_power": options.get("weight_lr_power", float, 2.0),
            "r": options.get("r", float, 0.0),
        }
        if kind != "RAdam":
            kwargs["warmup_steps"] = args.get_warmup_steps(max(args.max_steps, 1))
        if kind != "SGD":
            kwargs |= request.adam
        return getattr(module, f"{kind}ScheduleFree"), kwargs

    return build


def grokadamw(request: Request) -> Found:
    """Choose GrokAdamW. It is given betas and epsilon too, which upstream leaves at its defaults."""
    module = request.need("grokadamw", "grokadamw", "grokadamw")
    defaults = {
        "alpha_init": 0.98,
        "lamb": 2.0,
        "gamma": 0.1,
        "grokking_signal_decay_rate": 0.1,
        "gradient_clipping": 1.0,
    }
    given = {key: request.options.get(key, float, value) for key, value in defaults.items()}
    return module.GrokAdamW, {**request.adam, **given}


def torchao(cls: str) -> Builder:
    """Return the builder of one of torchao's AdamW classes with quantized moments."""

    def build(request: Request) -> Found:
        module = request.need("torchao.optim", "torchao", "torchao")
        return getattr(module, cls), {
            **request.adam,
            "block_size": request.options.get("block_size", int, 256),
            "bf16_stochastic_round": request.options.get("bf16_stochastic_round", truth, False),
        }

    return build


def vendor(module: str, cls: str, package: str) -> Builder:
    """Return the builder of a hardware maker's AdamW, which comes with its own build of PyTorch."""

    def build(request: Request) -> Found:
        return getattr(request.need(module, package), cls), request.adam

    return build


def anyprecision(request: Request) -> Found:
    """Choose AnyPrecisionAdamW of torchdistx."""
    module = request.need("torchdistx.optimizers", "torchdistx")
    options = request.options
    return module.AnyPrecisionAdamW, {
        **request.adam,
        "use_kahan_summation": options.get("use_kahan_summation", truth, False),
        "momentum_dtype": options.get("momentum_dtype", dtype, torch.float32),
        "variance_dtype": options.get("variance_dtype", dtype, torch.float32),
        "compensation_buffer_dtype": options.get(
            "compensation_buffer_dtype", dtype, torch.bfloat16
        ),
    }
