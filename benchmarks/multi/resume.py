"""Checkpoints in parts: saved on several ranks, resumed on one and back; how long a save stops training."""

import json
import os
import time
from pathlib import Path
from typing import Any

import gpt
from gpu_sides import CLIP, DECAY, LR, Tokens
from multi import ranks
from multi.contender import SIZES
from multi.sides import FSDP, LAYERS

EVERY = 2
"""Steps between saves."""

STAGES = {"save": 6, "one": 8, "back": 10}
"""Each stage trains up to that step, from where the stage before it ended."""


def run(stage: str, size: str, world: int, most: int, device: str, folder: Path) -> None:
    """Be one rank of a stage; rank 0 writes what it found to ``<stage>.json``.

    Args:
        stage: a key of ``STAGES``.
        size: of the model.
        world: number of ranks.
        most: number of ranks of the largest stage; all have its global batch.
        device: "cuda" or "cpu".
        folder: for checkpoints and results, the same for all stages.
    """
    ranks.place(device)
    resumes = stage != "save"
    found = _train(stage, SIZES[size], world, most, device, folder / "sync", resumes=resumes)
    if stage == "save":
        background = folder / "async"
        later = _train(
            stage, SIZES[size], world, most, device, background, async_save=True, resumes=False
        )
        found["async_stalls"] = later["stalls"]
    if os.environ.get("RANK", "0") == "0":
        (folder / f"{stage}.json").write_text(json.dumps(found))
    ranks.leave()


def _train(
    stage: str,
    size: gpt.Size,
    world: int,
    most: int,
    device: str,
    folder: Path,
    *,
    resumes: bool,
    **options: Any,
) -> dict[str, Any]:
    from trainer import Trainer, TrainingArguments

    if world > 1:
        parts = {"state_dict_type": "SHARDED_STATE_DICT"}
        options |= {**FSDP, "fsdp_config": {**LAYERS, **parts}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=max(1, size.batch // 4),
        gradient_accumulation_steps=most // world,
        max_steps=STAGES[stage],
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        bf16=True,
        save_steps=EVERY,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        **options,
    )
    watch = _watch(device)
    trainer = Trainer(
        gpt.build(size, device), arguments, train_dataset=Tokens(size), callbacks=[watch]
    )
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resumes)
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    size_of = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "began_at": watch.began_at,
        "began": watch.began,
        "ended_at": trainer.state.global_step,
        "ended": digest(trainer),
        "stalls": watch.stalls,
        "bytes": size_of,
    }


def digest(trainer: Any) -> str:
    """Return the digest of the whole train state; all ranks must call."""
    import trainstep as ts
    from trainstep import sharded

    return ts.digest(ts.tree.map(sharded.whole, trainer.train_state))


def _watch(device: str) -> Any:
    """Return a callback that takes the time of saves, and the digest with which training begins."""
    import torch

    from trainer import TrainerCallback

    class Watch(TrainerCallback):
        trainer: Any = None
        same_on_all_ranks = True

        def __init__(self) -> None:
            self.stalls: list[float] = []
            self.began, self.began_at, self._since = "", 0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began, self.began_at = digest(self.trainer), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            writer = self.trainer._writer
            while writer is not None and writer.busy:  # what is measured is one save at a time
                time.sleep(0.01)
            if device == "cuda":
                torch.cuda.synchronize()
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            self._since = time.perf_counter()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stalls.append((time.perf_counter() - self._since) * 1e3)

    return Watch()
