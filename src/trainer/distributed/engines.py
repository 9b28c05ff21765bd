"""Which engine makes the gradients of a run."""

from typing import Any

from trainer.distributed import fsdp_plan
from trainer.distributed.ddp import DDPEngine, joint_loss
from trainer.distributed.exact import ExactEngine
from trainer.distributed.ranks import Ranks
from trainer.distributed.windows import Windows
from trainer.engine import LocalEngine
from trainstep import TrainState


def make_engine(trainer: Any, state: TrainState, windows: Windows, ranks: Ranks) -> LocalEngine:
    """Return the engine that the arguments and the number of processes ask for.

    Raises:
        NotImplementedError: for optimizers that update during the backward pass, before gradients of
            several processes or micro-batches are added.
        ValueError: if ``exact_reduction`` cannot keep its promise with this model.
    """
    args = trainer.args
    if trainer._zero is not None:
        from trainer.distributed.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(trainer, state, windows, ranks)
    if not ranks.many and not args.exact_reduction:
        return LocalEngine(trainer, state)
    if trainer._adopted.fused is not None:
        raise NotImplementedError(
            f"optim={args.optim!s} updates parameters during the backward pass, before gradients are added "
            "up over processes or in a tree. Train with one process and exact_reduction=False, or "
            "choose another optimizer."
        )
    if fsdp_plan.wanted(args):
        from trainer.distributed.fsdp_engine import FSDPEngine

        return FSDPEngine(trainer, state, windows, ranks)
    kind = ExactEngine if args.exact_reduction else DDPEngine
    return kind(trainer, state, windows, ranks)


def sums_losses_later(args: Any, ranks: Ranks) -> bool:
    """Tell whether each process knows its share of an update's loss only, until it is logged."""
    return ranks.many and not args.exact_reduction and not joint_loss(args)
