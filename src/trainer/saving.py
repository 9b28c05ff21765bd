"""The trainer's side of checkpoints: what goes in, and how a run takes it up again."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer import checkpoint, modeling
from trainer.callbacks import TRAINER_STATE_NAME, TrainerState, restore_callback_states
from trainer.checkpoint import host_rng
from trainer.loop import Run
from trainer.meter import Meter
from trainer.optimizers import Adopted

logger = logging.getLogger(__name__)

# Arguments that may differ between a run and its continuation without anybody caring.
_FREE = frozenset(
    {"output_dir", "disable_tqdm", "report_to", "run_name", "resume_from_checkpoint", "log_level"}
)


def find_checkpoint(trainer: Any, wanted: str | Path | bool | None) -> checkpoint.Loaded | None:
    """Load the checkpoint to resume from: the newest that verifies, or the folder given, or none.

    Raises:
        ValueError: if ``wanted`` is True and no checkpoint verifies.
        CheckpointError: if the folder given is missing or damaged.
    """
    if not wanted:
        return None
    if wanted is not True:
        return checkpoint.load(Path(str(wanted)))
    root = Path(trainer.args.output_dir)
    path, skipped = checkpoint.newest(root)
    for folder, reason in skipped:
        logger.warning("Checkpoint %s is passed over: %s", folder, reason)
    if path is None:
        reasons = "".join(f"\n  {folder.name}: {reason}" for folder, reason in skipped)
        raise ValueError(
            f"resume_from_checkpoint=True, but there is no complete checkpoint in {root}.{reasons}\n"
            "Call train() without it to start anew, or give the path of a checkpoint."
        )
    return checkpoint.load(path)


def restore(trainer: Any, run: Run, meter: Meter, found: checkpoint.Loaded) -> None:
    """Put a run where ``found`` was written."""
    logger.info("Resuming from %s", found.path)
    _report_changes(trainer.args, found)
    state = TrainerState.from_json(found.trainer_state, str(found.path / TRAINER_STATE_NAME))
    state.train_batch_size = trainer._train_batch_size
    state.compute_steps(trainer.args, run.plan.max_steps)
    state.init_training_references(trainer, run.plan.max_steps, run.plan.num_train_epochs, None)
    trainer.state = state
    if trainer.args.restore_callback_states_from_checkpoint:
        trainer.control = run.control = restore_callback_states(
            trainer.callback_handler.callbacks, trainer.control, state.stateful_callbacks
        )
    if found.state is None:
        logger.warning(
            "%s was saved with save_only_model: the weights are restored, optimizer moments are not.",
            found.path,
        )
        modeling.load_weights(trainer.model, found.path)
        run.state = run.state.evolve(step=state.global_step)
    else:
        run.state = _adopt(trainer._adopted, run.state, found.state)
    trainer._rates.restore(found.position.get("scheduler"), run.state.step)
    _seek(trainer, run, found)
    if "meter" in found.position:
        meter.restore(found.position["meter"])
    if 0 in found.host_rng:
        host_rng.restore(found.host_rng[0])


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
    _mark_best(root, step, state)
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
            writer.submit(root, step, contents, on_done=tidy)
        else:
            tidy(checkpoint.save(root, step, contents))
    except checkpoint.CheckpointError:
        state.best_model_checkpoint = before
        raise


def note_failure(trainer: Any) -> None:
    """Warn of a background save that has failed since the last look; never waits."""
    if trainer._writer is not None:
        try:
            trainer._writer.check()
        except checkpoint.CheckpointError as error:
            logger.warning("A checkpoint was not saved, training goes on: %s", error)


def finish(writer: checkpoint.BackgroundWriter) -> None:
    """Let a save end while an exception is on its way up; its own failure is only logged."""
    try:
        writer.wait()
    except checkpoint.CheckpointError as error:
        logger.error("A checkpoint was not saved: %s", error)


def load_best(trainer: Any) -> None:
    """Load the weights of the best checkpoint into the model, in place; warns if it is not there."""
    best = trainer.state.best_model_checkpoint
    if best is None:
        logger.warning(
            "load_best_model_at_end: no checkpoint holds the best model; keeping the last"
        )
        return
    problems = checkpoint.verify(Path(best))
    if problems:
        logger.warning("The best checkpoint %s is damaged, keeping the last: %s", best, problems[0])
        return
    if Path(best).name != checkpoint.checkpoint_dir("", trainer.state.best_global_step).name:
        logger.warning(
            "load_best_model_at_end: step %d was the best but has no checkpoint; loading that of the "
            "best step before",
            trainer.state.best_global_step,
        )
    logger.info("Loading the best model from %s (score %s)", best, trainer.state.best_metric)
    trainer._load_model(Path(best))


def keep_only(root: Path, best: Path) -> None:
    """Delete every checkpoint in ``root`` but ``best``."""
    for path in checkpoint.list_checkpoints(root):
        if path.resolve() != best.resolve():
            logger.info("Deleting %s (save_total_limit=1)", path)
            shutil.rmtree(path)


def _mark_best(root: Path, step: int, state: TrainerState) -> None:
    if state.best_global_step is not None:
        path = checkpoint.checkpoint_dir(root, state.best_global_step)
        if state.best_global_step == step or path.is_dir():
            state.best_model_checkpoint = str(path)


def _adopt(adopted: Adopted, mine: ts.TrainState, theirs: ts.TrainState) -> ts.TrainState:
    """Copy weights into the tensors of ``mine``, which the module shares; take over the rest."""
    if adopted.translated:
        ts.serialize.check_like(theirs, mine)
    else:  # an optimizer that runs itself fills its state when it first steps
        empty: dict[str, Any] = {"opt_state": (), "extras": {}}
        ts.serialize.check_like(theirs.evolve(**empty), mine.evolve(**empty))

    def place(new: Any, old: Any) -> Any:
        return new.to(old.device) if isinstance(new, Tensor) else new

    with torch.no_grad():
        for target, source in ((mine.params, theirs.params), (mine.buffers, theirs.buffers)):
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
    now = trainer._train_batch_size * trainer.args.world_size
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


def _report_changes(args: Any, found: checkpoint.Loaded) -> None:
    now = json.loads(json.dumps(args.to_sanitized_dict(), default=str))
    before = json.loads(json.dumps(found.arguments, default=str))
    changed = [
        f"{name}: {value!r} (from args) != {before[name]!r} (from {found.path.name})"
        for name, value in now.items()
        if name not in _FREE and name in before and before[name] != value
    ]
    if changed:
        logger.warning(
            "Arguments differ from those of the checkpoint; those given now are used:\n  %s",
            "\n  ".join(changed),
        )


def note_best(args: Any, state: TrainerState, metrics: dict[str, float]) -> bool:
    """Record in ``state`` whether an evaluation is the best so far; returns whether it is.

    Raises:
        KeyError: if the metric that ``metric_for_best_model`` names is not there.
    """
    if args.metric_for_best_model is None:
        return False
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise KeyError(
            f"metric_for_best_model={args.metric_for_best_model!r}: the evaluation gave no {name}; "
            f"it gave {', '.join(metrics)}. Let compute_metrics return it."
        )
    value, best = metrics[name], state.best_metric
    if best is not None and not (value > best if args.greater_is_better else value < best):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True
