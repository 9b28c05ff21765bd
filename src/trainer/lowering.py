"""How the steps of a run are carried out: as they are, compiled, or from CUDA graphs."""

import logging
from collections.abc import Iterator
from typing import Any

import trainstep as ts
from trainer.captured import CapturedEngine
from trainer.engine import LocalEngine
from trainer.facade.losses import LossMixin

logger = logging.getLogger(__name__)

# Hooks whose overrides may do things on the host, which a recording would do once and never again.
_IMPERATIVE = (
    "training_step",
    "compute_loss",
    "compute_loss_context_manager",
    "autocast_smart_context_manager",
    "_prepare_inputs",
    "_prepare_input",
)


def engage(trainer: Any, run: Any, engine: LocalEngine) -> None:
    """Set ``run.step`` and ``run.engine``, which are given as they are, to the fastest that is safe.

    Says once what was chosen, and why.
    """
    compiled = "compiled" if trainer.args.torch_compile else "eager"
    reasons = list(_against_capture(trainer, run.state))
    if reasons:
        logger.info("Steps are %s, without CUDA graphs: %s.", compiled, "; ".join(reasons))
        return
    plain = run.step
    captured = ts.capture(plain)

    def give_up() -> None:
        run.step = plain

    device = trainer.args.device
    run.step, run.engine = captured, CapturedEngine(engine, captured, device, give_up)
    logger.info(
        "Steps are %s, and recorded in CUDA graphs once a shape of batch comes for the third time.",
        compiled,
    )


def recorded(run: Any) -> bool:
    """Whether steps come from CUDA graphs, so that the host can be ahead of the device."""
    return isinstance(run.engine, CapturedEngine)


def _against_capture(trainer: Any, state: ts.TrainState) -> Iterator[str]:
    """Give the reasons why this run is not captured; none if it may be."""
    args = trainer.args
    if args.capture == "off":
        yield 'capture="off"'
    if args.device.type != "cuda":
        yield f"the device is {args.device.type}"
    elif {p.device for p in state.params.values()} != {_indexed(args.device)}:
        yield "the parameters are not all on one GPU"
    if args.world_size > 1:
        yield f"{args.world_size} processes share each step"
    if args.exact_reduction:
        yield "exact_reduction adds gradients in a tree"
    for name in _IMPERATIVE:
        hook = getattr(trainer, name)  # replaced on the object, perhaps
        if getattr(hook, "__func__", None) is not getattr(LossMixin, name):
            yield f"{type(trainer).__name__} overrides {name}"
    if trainer.callback_handler.listens("on_pre_optimizer_step"):
        yield "a callback wants the clipped gradients (on_pre_optimizer_step)"
    if trainer._adopted.fused is not None:
        yield f"optim={args.optim!s} updates during the backward pass"
    if args.torch_empty_cache_steps is not None:
        yield "torch_empty_cache_steps empties the cache inside the step"
    if args.torch_compile_mode in ("reduce-overhead", "max-autotune"):
        yield f"torch_compile_mode={args.torch_compile_mode!r} makes CUDA graphs of its own"
    if any(_has_hooks(module) for module in trainer.model.modules()):
        yield "the model has hooks, which may do things on the host"


def _has_hooks(module: Any) -> bool:
    forward = [h for h in module._forward_hooks.values() if not getattr(h, "recordable", False)]
    return bool(forward or module._forward_pre_hooks or module._backward_hooks)


def _indexed(device: Any) -> Any:
    import torch

    return (
        torch.device(device.type, torch.cuda.current_device()) if device.index is None else device
    )
