"""A training as a script has it, for launchers to start."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

import trainstep as ts
from support.ranks.launch import report
from support.shell import make_trainer, samples, scored


def long(folder: Path, world: int) -> Any:
    """Return a trainer of 40 updates with dropout; 8 micro-batches of 2 are one, whoever has them."""
    return make_trainer(
        folder,
        scored("dropout"),
        train=samples(150),
        exact_reduction=True,
        gradient_accumulation_steps=8 // world,
        per_device_train_batch_size=2,
        num_train_epochs=4,
    )


def main(folder: Path, kind: str = "short") -> None:
    """Train for one epoch; whether the CPU is used is left to the launcher."""
    torch.set_num_threads(1)
    if kind == "long":
        trainer = long(folder / "out", int(os.environ["WORLD_SIZE"]))
    else:
        trainer = make_trainer(
            folder / "out",
            scored("dropout"),
            train=samples(15),
            exact_reduction=True,
            use_cpu=False,
            save_on_each_node=kind == "each node",
            save_strategy="epoch" if kind == "each node" else "no",
        )
    trainer.train()
    args = trainer.args
    place = {"world": args.world_size, "rank": args.process_index, "device": args.device.type}
    found = {**place, "local": args.local_process_index, "saves": args.should_save}
    report(folder, {**found, "digest": ts.digest(trainer.train_state), "env": os.environ["RANK"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
