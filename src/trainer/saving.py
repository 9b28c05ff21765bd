"""The trainer's side of checkpoints: what goes in, and what becomes of failures."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import best, checkpoint, hf_checkpoints
from trainer.best import keep_only as keep_only
from trainer.best import mark_best
from trainer.best import note_best as note_best
from trainer.checkpoint import host_rng
from trainer.choosing import find_checkpoint as find_checkpoint
from trainer.distributed import agree, fsdp_plan
from trainer.distributed.ranks import rows_of_rank
from trainer.distributed.start import share_model
from trainer.loop import Run
from trainer.meter import Meter
from trainer.resuming import changed_arguments as changed_arguments
from trainer.resuming import restore as restore
from trainer.support import refuse_bypassed_hooks

logger = logging.getLogger(__name__)


def save_checkpoint(trainer: Any, run: Run, meter: Meter) -> None:
    """Write ``checkpoint-<step>`` and rotate; with ``async_save``, in a thread.

    Old checkpoints that cannot be deleted are only warned of.

    Raises:
        CheckpointError: if it cannot be written; what was there before still is.
    """
    state, ranks, step = trainer.state, trainer._ranks, run.state.step
    root = Path(trainer._get_output_dir(trial=None))
    before = state.best_model_checkpoint
    mark_best(root, step, state)
    state.stateful_callbacks = trainer._exported_callbacks()
    contents = _distributed(trainer, _contents(trainer, run, meter))
    kept = state.best_model_checkpoint

    def tidy(path: Path) -> None:
        try:
            keep = [kept] if kept else []
            checkpoint.rotate(root, trainer.args.save_total_limit, keep=keep, saved=path)
        except checkpoint.CheckpointError as error:
            logger.warning("After saving step %d: %s", step, error)

    try:
        _put(trainer, root, step, contents, tidy)
    except checkpoint.CheckpointError:
        state.best_model_checkpoint = before
        raise
    state.best_model_checkpoint = agree.from_first(ranks, state.best_model_checkpoint)


def _contents(trainer: Any, run: Run, meter: Meter) -> checkpoint.Contents:
    """Return what a checkpoint holds, as one process has it."""
    args, ranks, writer = trainer.args, trainer._ranks, trainer._writer
    data = agree.gather(ranks, run.batches.state(run.epoch))
    position = {
        "epoch": run.epoch,
        "batch": run.batch,
        "in_epoch": run.in_epoch,
        "batch_size": rows_of_rank(args, trainer._train_batch_size) * args.world_size,
        "accumulation": run.accumulation,
        "meter": meter.state(),
        "scheduler": trainer._rates.state(),
        "data": data[0],
        "unfinished": list(trainer._interruption.unfinished),
    }
    if any(other != data[0] for other in data):  # each reads samples of its own
        position["data_of_ranks"] = data
    if trainer._zero is None and (written := trainer._rates.written()):  # else DeepSpeed keeps it
        position["options"] = written
    only_model = args.save_only_model
    return checkpoint.Contents(
        write_model=(
            trainer._write_model
            if writer
            else lambda folder: trainer.save_model(str(folder), _internal_call=True)
        ),
        state=None if only_model else run.state,
        position=position,
        trainer_state=trainer.state.to_json(),
        arguments=args.to_sanitized_dict(),
        host_rng={} if only_model else dict(enumerate(agree.gather(ranks, host_rng.capture()))),
        world_size=ranks.size,
        model_tensors=trainer._model_tensors() if writer and not fsdp_plan.wanted(args) else None,
        hf=hf_checkpoints.parts_of(trainer, run) if args.checkpoint_format == "hf" else None,
    )


def _distributed(trainer: Any, contents: checkpoint.Contents) -> checkpoint.Contents:
    """Return what a checkpoint holds if processes hold parts of it; all must call."""
    refuse_bypassed_hooks(trainer, saves=True)  # callbacks may save where the arguments do not
    if fsdp_plan.wanted(trainer.args):
        from trainer.distributed import fsdp_state

        return fsdp_state.distributed_contents(trainer, contents)
    if trainer._zero is not None:
        from trainer.distributed import deepspeed_state

        return deepspeed_state.contents_of(trainer, contents)
    return contents


def _put(
    trainer: Any,
    root: Path,
    step: int,
    contents: checkpoint.Contents,
    tidy: Callable[[Path], None],
) -> None:
    """Write a checkpoint, now or in a thread; all processes must call.

    Raises:
        CheckpointError: on every process, if one of them fails.
    """
    args, ranks, writer = trainer.args, trainer._ranks, trainer._writer
    if trainer._zero is not None and not args.save_only_model:
        from trainer.distributed import deepspeed_state

        # Agrees by itself; what else it raises must end this process, which the others notice.
        path = deepspeed_state.save(trainer, root, step, contents)
        if ranks.first:
            tidy(path)
        return

    def write() -> None:
        if contents.layout is not None:
            from trainer.distributed import fsdp_state

            note_failure(trainer, wait=True)
            fsdp_state.write(trainer, root, step, contents, tidy)
        elif writer:
            note_failure(trainer, wait=True)  # else that of the last save would stand for this one
            writer.submit(root, step, contents, on_done=tidy)
        elif args.should_save:
            tidy(checkpoint.save(root, step, contents))

    agree.together(ranks, f"saving step {step}", write, checkpoint.CheckpointError)


def close(trainer: Any) -> None:
    """Wait for the last save, which must not fail unnoticed; if it does, on all processes.

    Raises:
        CheckpointError: if it failed.
    """

    def wait() -> None:
        if trainer._writer is not None:
            trainer._writer.close()

    agree.together(trainer._ranks, "the last save", wait, checkpoint.CheckpointError)


def load_best(trainer: Any) -> None:
    """Load the best checkpoint's weights, read by process 0, into the model of every process."""
    ranks = trainer._ranks
    if fsdp_plan.wanted(trainer.args) or trainer._zero is not None:
        from trainer.distributed import deepspeed_resume, fsdp_state

        path = best.choose(trainer) if ranks.first else None
        if (path := agree.from_first(ranks, path)) is not None:
            load = fsdp_state.read_weights if trainer._zero is None else deepspeed_resume.load_best
            load(trainer, path)
        return

    def read() -> None:
        if ranks.first:
            best.load_best(trainer)

    agree.together(ranks, "loading the best model", read, RuntimeError)
    if ranks.many:
        share_model(trainer.model)


def note_failure(trainer: Any, *, wait: bool = False) -> None:
    """Warn of a background save that has failed since the last look; with ``wait``, when it has ended."""
    if trainer._writer is not None:
        try:
            trainer._writer.wait() if wait else trainer._writer.check()
        except checkpoint.CheckpointError as error:
            logger.warning("A checkpoint was not saved, training goes on: %s", error)


def finish(writer: checkpoint.BackgroundWriter) -> None:
    """Let a save end while an exception is on its way up; its own failure is only logged."""
    try:
        writer.close()
    except checkpoint.CheckpointError as error:
        logger.error("A checkpoint was not saved: %s", error)
