"""How the processes of a run come to stand at the same place before its first step."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

from trainer import modeling
from trainer.distributed import agree, fsdp_plan
from trainer.distributed.ranks import Ranks
from trainer.distributed.reduce import broadcast_
from trainer.plan import Plan

# Arguments that decide how many operations a run has that need all processes, and what they hold.
_SHARED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "data_seed",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_figures",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "on_nonfinite",
    "exact_reduction",
    "average_tokens_across_devices",
    "dataloader_drop_last",
    "enable_jit_checkpoint",
    "load_best_model_at_end",
    "log_digest_steps",
)


def begin(trainer: Any, ranks: Ranks) -> None:
    """Check that all processes train the same, and give them the weights of process 0.

    Raises:
        ValueError: on every process, naming the arguments or the tensors of the model that differ.
    """
    if not ranks.many:
        return
    args = trainer.args
    given = {name: str(getattr(args, name)) for name in _SHARED}
    form = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in _named(trainer.model)}
    _check_alike("argument", agree.gather(ranks, given))
    _check_alike("tensor of the model", agree.gather(ranks, form))
    if fsdp_plan.wanted(args):
        from trainer.distributed import fsdp

        fsdp.shard(trainer)
    elif not any(hasattr(p, "ds_id") for p in trainer.model.parameters()):
        share_model(trainer.model)  # models that DeepSpeed has taken apart are shared already


def share_model(model: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0, in place."""
    broadcast_(tensor.data for _, tensor in _named(model))


def same_plan(plan: Plan, ranks: Ranks) -> Plan:
    """Return the plan of the process with most data, so that all make the same updates."""
    if not ranks.many:
        return plan
    plans = agree.gather(ranks, plan)
    return max(plans, key=lambda one: (one.max_steps, one.batches_per_epoch or 0))


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    model = modeling.unwrap(model)
    return chain(model.named_parameters(), model.named_buffers())


def _check_alike(what: str, values: list[dict[str, str]]) -> None:
    first = values[0]
    for rank, other in enumerate(values):
        for name in [*first, *(key for key in other if key not in first)]:
            mine, theirs = first.get(name, "none"), other.get(name, "none")
            if mine != theirs:
                raise ValueError(
                    f"the {what} {name} differs between processes: {mine} on process 0, {theirs} on "
                    f"process {rank}. Give all processes the same."
                )
