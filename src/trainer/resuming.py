"""How a run takes up a checkpoint: what is restored, where the data go on."""

import json
import logging
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer import checkpoint, hf_checkpoints
from trainer.callbacks import TRAINER_STATE_NAME, TrainerState
from trainer.checkpoint import host_rng
from trainer.distributed import fsdp_plan
from trainer.distributed.ranks import Ranks, rows_of_rank
from trainer.loop import Run
from trainer.meter import Meter
from trainer.optimizers import Adopted

logger = logging.getLogger(__name__)

# Arguments that may differ between a run and its continuation without anybody caring.
_FREE = frozenset(
    {"output_dir", "disable_tqdm", "report_to", "run_name", "resume_from_checkpoint", "log_level"}
    | {"log_digest_steps", "log_figures", "peak_tflops", "push_to_hub"}
)


def restore(trainer: Any, run: Run, meter: Meter, found: checkpoint.Loaded) -> None:
    """Put a run where ``found`` was written."""
    logger.info("Resuming from %s", found.path)
    if "deepspeed" in found.position and trainer._zero is None:
        raise ValueError(
            f"{found.path} was saved by a training with deepspeed, whose state only DeepSpeed can read. "
            "Set deepspeed in the arguments, or make model files of it with the zero_to_fp32.py in it and "
            "start anew from those."
        )
    _report_changes(trainer.args, found)
    state = TrainerState.from_json(found.trainer_state, str(found.path / TRAINER_STATE_NAME))
    state.train_batch_size = trainer._train_batch_size
    state.compute_steps(trainer.args, run.plan.max_steps)
    state.init_training_references(trainer, run.plan.max_steps, run.plan.num_train_epochs, None)
    trainer.state = state
    if trainer.args.restore_callback_states_from_checkpoint:
        trainer._load_callback_state()
        run.control = trainer.control
    if found.foreign is not None:
        scheduler = hf_checkpoints.take_up(trainer, run, meter, found)
    else:
        _take_up(trainer, run, meter, found)
        scheduler = found.position.get("scheduler")
    options = found.position.get("options", ())
    trainer._rates.restore(scheduler, run.state.step, options)
    rank = trainer._ranks.rank
    if rank in found.host_rng:
        host_rng.restore(found.host_rng[rank])
    elif found.host_rng:
        logger.info("%s has no random state of process %d's host.", found.path, rank)


def _take_up(trainer: Any, run: Run, meter: Meter, found: checkpoint.Loaded) -> None:
    """Take over state, position and running means from a checkpoint of this package."""
    if trainer._zero is not None:
        from trainer.distributed import deepspeed_resume

        run.state = deepspeed_resume.take_up(trainer, run.state, found)
    elif fsdp_plan.wanted(trainer.args):
        _take_up_parts(trainer, run, found)
    elif found.state is None:
        logger.warning(
            "%s was saved with save_only_model: the weights are restored, optimizer moments are not.",
            found.path,
        )
        trainer._load_from_checkpoint(str(found.path))
        run.state = run.state.evolve(step=trainer.state.global_step)
    else:
        own = trainer._overrides("_load_from_checkpoint")
        run.state = _adopt(trainer._adopted, run.state, found.state, weights=not own)
        if own:
            trainer._load_from_checkpoint(str(found.path))
    trainer._interruption.unfinished = tuple(found.position.get("unfinished", ()))
    _seek(trainer, run, found)
    if "meter" in found.position:
        meter.restore(found.position["meter"])


def _take_up_parts(trainer: Any, run: Run, found: checkpoint.Loaded) -> None:
    from trainer.distributed import fsdp_state

    if found.source is None:
        raise ValueError(
            f"{found.path} was saved with save_only_model, which distributed training (fsdp) cannot "
            "resume: build the model from it (from_pretrained) and start anew."
        )
    run.state = fsdp_state.take_up(run.state, found, trainer._adopted, trainer._ranks)


def _adopt(
    adopted: Adopted, mine: ts.TrainState, theirs: ts.TrainState, *, weights: bool
) -> ts.TrainState:
    """Copy weights into the tensors of ``mine``, which the module shares; take over the rest."""
    if adopted.translated:
        ts.serialize.check_like(theirs, mine)
    else:  # an optimizer that runs itself fills its state when it first steps
        empty: dict[str, Any] = {"opt_state": (), "extras": {}}
        ts.serialize.check_like(theirs.evolve(**empty), mine.evolve(**empty))

    def place(new: Any, old: Any) -> Any:
        return new.to(old.device) if isinstance(new, Tensor) else new

    pairs = ((mine.params, theirs.params), (mine.buffers, theirs.buffers)) if weights else ()
    with torch.no_grad():
        for target, source in pairs:
            for name, tensor in source.items():
                target[name].copy_(tensor)
    opt_state = theirs.opt_state
    if adopted.translated:
        opt_state = ts.tree.map(place, opt_state, mine.opt_state)
    return mine.evolve(
        step=theirs.step,
        key=theirs.key,
        opt_state=adopted.attach(opt_state),
        extras=theirs.extras,
    )


def _seek(trainer: Any, run: Run, found: checkpoint.Loaded) -> None:
    position = found.position
    run.epoch, run.batch = position["epoch"], position["batch"]
    run.in_epoch = position["in_epoch"]
    if trainer.args.ignore_data_skip:
        run.batch = 0
        return
    run.batches.load(_data(position, trainer._ranks, found))
    now = rows_of_rank(trainer.args, trainer._train_batch_size) * trainer.args.world_size
    if now == position["batch_size"]:
        return
    samples = run.batch * position["batch_size"]
    if run.plan.batches_per_epoch is not None and samples >= run.plan.num_examples:
        run.batch = run.plan.batches_per_epoch  # the epoch was over, with a batch that was not full
        return
    if samples % now:
        raise ValueError(
            f"{found.path} was written after {samples} samples of epoch {run.epoch}, in batches of "
            f"{position['batch_size']}; a batch of {now} does not divide that. Use a batch size that "
            "does, or ignore_data_skip=True to begin the epoch again."
        )
    run.batch = samples // now
    if trainer.args.max_steps <= 0:
        logger.warning(
            "Batches hold %d samples instead of %d: num_train_epochs=%g now stands for %d updates in all, "
            "%d of which are made. Set max_steps for another end.",
            *(now, position["batch_size"], trainer.args.num_train_epochs),
            *(run.plan.max_steps, run.state.step),
        )


def _data(position: dict[str, Any], ranks: Ranks, found: checkpoint.Loaded) -> Any:
    """Return where this process goes on in the data, if that takes more than a number."""
    each = position.get("data_of_ranks")
    if each is None:
        return position.get("data")
    if len(each) != ranks.size:
        raise ValueError(
            f"{found.path} was written by {len(each)} processes, among which the dataset divides its "
            f"samples itself, so it cannot be continued with {ranks.size}. Launch as many, or set "
            "ignore_data_skip=True to begin the epoch again."
        )
    return each[ranks.rank]


def changed_arguments(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that both have with other values, as name -> (before, now).

    Those that say only where and how a run reports are left out.
    """
    before, now = (json.loads(json.dumps(one, default=str)) for one in (before, now))
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name not in _FREE and name in before and before[name] != value
    }


def _report_changes(args: Any, found: checkpoint.Loaded) -> None:
    changed = [
        f"{name}: {value!r} (from args) != {before!r} (from {found.path.name})"
        for name, (before, value) in changed_arguments(
            found.arguments, args.to_sanitized_dict()
        ).items()
    ]
    if changed:
        logger.warning(
            "Arguments differ from those of the checkpoint; those given now are used:\n  %s",
            "\n  ".join(changed),
        )
