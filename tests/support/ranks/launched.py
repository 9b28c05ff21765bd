"""A training as a script has it, for launchers to start."""

import os
import sys
from pathlib import Path

import torch

import trainstep as ts
from support.ranks.launch import report
from support.shell import make_trainer, samples, scored


def main(folder: Path) -> None:
    """Train for one epoch; whether the CPU is used is left to the launcher."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        folder / "out", scored("dropout"), train=samples(15), exact_reduction=True, use_cpu=False
    )
    trainer.train()
    args = trainer.args
    found = {"world": args.world_size, "rank": args.process_index, "device": args.device.type}
    report(folder, {**found, "digest": ts.digest(trainer.train_state), "env": os.environ["RANK"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
