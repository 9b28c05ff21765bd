"""How the steps of a run are carried out: as they are, compiled, or from CUDA graphs."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import trainstep as ts
from trainer.captured import CapturedEngine, RetreatingStep
from trainer.changes import Changes
from trainer.circumstances import Circumstances, has_hooks
from trainer.engine import LocalEngine
from trainer.facade.losses import LossMixin
from trainer.host_reads import HostReads
from trainstep.compiling import OWN_GRAPHS

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

_ABOUT_MASKS = (
    " transformers asks about masks on the host, unless the model is compiled. Where masks are on the GPU "
    "before a step, or batches have position_ids, torch_compile=True lets steps be recorded."
)


def engage(trainer: Any, run: Any, engine: LocalEngine) -> None:
    """Set ``run.step`` and ``run.engine``, which are given as they are, to the fastest that is safe.

    Says once what was chosen, and why; ``trainer.lowering`` has it as well.
    """
    kind = "compiled" if trainer.args.torch_compile else "eager"
    reasons = "; ".join(_against_capture(trainer, run.state))
    if reasons:
        trainer.lowering = f"{kind}, without CUDA graphs: {reasons}"
        logger.info("Steps are %s.", trainer.lowering)
        return
    plain = run.step

    def retreat(reason: str) -> None:
        run.step = plain
        if "masking_utils" in reason and kind == "eager":
            reason += _ABOUT_MASKS
        trainer.lowering = f"{kind}, without CUDA graphs: {reason}"
        logger.warning("capture is off, training goes on without it: %s", reason)

    captured = RetreatingStep(plain, retreat=lambda reason: run.engine.give_up(reason))
    changes = Changes(
        Circumstances(trainer.model),
        trainer.callback_handler,
        lambda: _against_capture(trainer, run.state),
    )
    device = trainer.args.device
    # A compiled model asks nothing, and would be compiled anew for an answer.
    reads = HostReads(device) if kind == "eager" else None
    recording = CapturedEngine(engine, captured, device, changes, reads, retreat)
    ahead = run.ahead

    def noted(window: list[Any]) -> Iterable[Any]:
        recording.note(window)
        return ahead(window)

    run.step, run.engine, run.ahead = captured, recording, noted
    run.verify, run.close = recording.check, recording.close
    trainer.lowering = f"{kind}, recorded in CUDA graphs"
    logger.info("Steps are %s, once a shape of batch comes for the third time.", trainer.lowering)


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
    if args.torch_compile_mode in OWN_GRAPHS:
        yield f"torch_compile_mode={args.torch_compile_mode!r} makes CUDA graphs of its own"
    if has_hooks(trainer.model):
        yield "the model has hooks, which may do things on the host"


def _indexed(device: torch.device) -> torch.device:
    return (
        torch.device(device.type, torch.cuda.current_device()) if device.index is None else device
    )
