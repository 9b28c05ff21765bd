"""How a run takes up what DeepSpeed saved: verified by the manifest, then loaded by the engine itself."""

from pathlib import Path
from typing import Any

import trainstep as ts
from trainer.checkpoint import CheckpointError, Loaded, open_lazily
from trainer.checkpoint.hf_format import is_foreign
from trainer.checkpoint.layout import DEEPSPEED
from trainer.distributed import agree
from trainer.distributed.deepspeed_plan import Zero
from trainer.distributed.deepspeed_state import entry_of
from trainer.distributed.ranks import Ranks


def open_checkpoint(path: Path, ranks: Ranks) -> Loaded:
    """Read a checkpoint but for the engine's files, of which this process verifies its share.

    Raises:
        CheckpointError: if it is damaged, or no checkpoint of a training with DeepSpeed.
    """
    if is_foreign(path):
        raise CheckpointError(
            f"{path}: a checkpoint of the Hugging Face Trainer cannot be resumed with deepspeed; build the "
            "model from its weights and start anew"
        )
    found = open_lazily(path)
    names = sorted(name for name in found.manifest.files if name.startswith("global_step"))
    for name in names[ranks.rank :: ranks.size]:
        expected = found.manifest.files[name]
        try:
            actual = entry_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if actual != expected:
            raise CheckpointError(
                f"{path}: {name} is damaged: it has {actual.size} bytes and SHA-256 {actual.sha256}, "
                f"expected {expected.size} and {expected.sha256}. Resume from another checkpoint"
            )
    return found


def take_up(trainer: Any, mine: ts.TrainState, found: Loaded) -> ts.TrainState:
    """Let the engine go on from a checkpoint, and return the state there.

    Raises:
        ValueError: if it was saved by another number of processes, or with another stage or precision.
        CheckpointError: if DeepSpeed cannot read it.
    """
    zero: Zero = trainer._zero
    saved = found.position.get(DEEPSPEED)
    if saved is None or found.source is None:
        raise ValueError(
            f"{found.path} holds no state of DeepSpeed: it was saved without deepspeed, or with "
            "save_only_model. Build the model from its weights (from_pretrained) and start anew."
        )
    ours = {"stage": zero.stage, "half": zero.half, "world_size": trainer._ranks.size}
    wrong = [f"{k}: {saved[k]} then, {v} now" for k, v in ours.items() if saved[k] != v]
    if wrong:
        raise ValueError(
            f"{found.path} cannot be resumed, because DeepSpeed's state fits neither another number of "
            f"processes nor another stage or precision: {'; '.join(wrong)}. Launch the run as it was, or "
            "make model files of it with zero_to_fp32.py and start anew."
        )
    _load(trainer, found.path, saved["tag"])
    source = ts.serialize.from_flat({}, found.source.metadata)
    return mine.evolve(step=source.step, key=source.key)


def load_best(trainer: Any, path: Path) -> None:
    """Put the engine, and with it the model, where a checkpoint of this run was saved; all must call."""
    found = agree.together(
        trainer._ranks,
        f"reading {path}",
        lambda: open_checkpoint(path, trainer._ranks),
        CheckpointError,
    )
    _load(trainer, path, found.position[DEEPSPEED]["tag"])


def _load(trainer: Any, path: Path, tag: str) -> None:
    engine = trainer._zero.engine
    loaded, _ = engine.load_checkpoint(str(path), tag=tag)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found no checkpoint {tag} in it")
