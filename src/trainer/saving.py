"""The trainer's side of checkpoints: what goes in, and what becomes of failures."""

import logging
from pathlib import Path
from typing import Any

from trainer import checkpoint, hf_checkpoints
from trainer.best import keep_only as keep_only
from trainer.best import load_best as load_best
from trainer.best import mark_best
from trainer.best import note_best as note_best
from trainer.checkpoint import host_rng
from trainer.loop import Run
from trainer.meter import Meter
from trainer.resuming import changed_arguments as changed_arguments
from trainer.resuming import find_checkpoint as find_checkpoint
from trainer.resuming import restore as restore

logger = logging.getLogger(__name__)


def save_checkpoint(trainer: Any, run: Run, meter: Meter) -> None:
    """Write ``checkpoint-<step>`` and rotate; with ``async_save``, in a thread.

    Old checkpoints that cannot be deleted are only warned of.

    Raises:
        CheckpointError: if it cannot be written; what was there before still is.
    """
    args, state = trainer.args, trainer.state
    root = Path(args.output_dir)
    step = run.state.step
    before = state.best_model_checkpoint
    mark_best(root, step, state)
    state.stateful_callbacks = trainer._exported_callbacks()
    only_model = args.save_only_model
    position = {
        "epoch": run.epoch,
        "batch": run.batch,
        "in_epoch": run.in_epoch,
        "batch_size": trainer._train_batch_size * args.world_size,
        "accumulation": run.accumulation,
        "meter": meter.state(),
        "scheduler": trainer._rates.state(),
        "data": run.batches.state(run.epoch),
        "unfinished": list(trainer._interruption.unfinished),
    }
    writer = trainer._writer
    contents = checkpoint.Contents(
        write_model=(
            trainer._write_model
            if writer
            else lambda folder: trainer.save_model(str(folder), _internal_call=True)
        ),
        state=None if only_model else run.state,
        position=position,
        trainer_state=state.to_json(),
        arguments=args.to_sanitized_dict(),
        host_rng={} if only_model else {0: host_rng.capture()},
        model_tensors=trainer._model_tensors() if writer else None,
        hf=hf_checkpoints.parts_of(trainer, run) if args.checkpoint_format == "hf" else None,
    )
    best = state.best_model_checkpoint

    def tidy(path: Path) -> None:
        try:
            keep = [best] if best else []
            checkpoint.rotate(root, args.save_total_limit, keep=keep, saved=path)
        except checkpoint.CheckpointError as error:
            logger.warning("After saving step %d: %s", step, error)

    try:
        if writer:
            note_failure(trainer, wait=True)  # else that of the last save would stand for this one
            writer.submit(root, step, contents, on_done=tidy)
        else:
            tidy(checkpoint.save(root, step, contents))
    except checkpoint.CheckpointError:
        state.best_model_checkpoint = before
        raise


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
