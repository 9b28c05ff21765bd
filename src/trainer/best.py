"""The best model so far: which step it was, and its checkpoint."""

import logging
import shutil
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.callbacks import TrainerState
from trainer.metrics import missing_metric

logger = logging.getLogger(__name__)


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
            f"metric_for_best_model={args.metric_for_best_model!r}: {missing_metric(name, metrics)}"
        )
    value, best = metrics[name], state.best_metric
    if best is not None and not (value > best if args.greater_is_better else value < best):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True


def load_best(trainer: Any) -> None:
    """Load the weights of the best checkpoint into the model, in place; warns if it is not there."""
    best = choose(trainer)
    if best is not None:
        trainer._load_model(best)


def choose(trainer: Any) -> Path | None:
    """Return the best checkpoint; None, after a warning, if it is not there or damaged."""
    best = trainer.state.best_model_checkpoint
    if best is None:
        logger.warning(
            "load_best_model_at_end: no checkpoint holds the best model; keeping the last"
        )
        return None
    problems = checkpoint.verify(Path(best), descriptions=False)
    if problems:
        logger.warning("The best checkpoint %s is damaged, keeping the last: %s", best, problems[0])
        return None
    if Path(best).name != checkpoint.checkpoint_dir("", trainer.state.best_global_step).name:
        logger.warning(
            "load_best_model_at_end: step %d was the best but has no checkpoint; loading that of the "
            "best step before",
            trainer.state.best_global_step,
        )
    logger.info("Loading the best model from %s (score %s)", best, trainer.state.best_metric)
    return Path(best)


def keep_only(root: Path, best: Path) -> None:
    """Delete every checkpoint in ``root`` but ``best``."""
    for path in checkpoint.list_checkpoints(root):
        if path.resolve() != best.resolve():
            logger.info("Deleting %s (save_total_limit=1)", path)
            shutil.rmtree(path)


def mark_best(root: Path, step: int, state: TrainerState) -> None:
    if state.best_global_step is not None:
        path = checkpoint.checkpoint_dir(root, state.best_global_step)
        if state.best_global_step == step or path.is_dir():
            state.best_model_checkpoint = str(path)
