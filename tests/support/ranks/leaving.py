"""A training, and the threads that are left when the interpreter shuts down."""

import atexit
import sys
from pathlib import Path
from typing import Any

import torch

from support.ranks.launch import report
from support.shell import make_trainer, samples, scored


def left(folder: Path) -> None:
    """Report the names of all threads."""
    report(
        folder, [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    )


def train(folder: Path, *, exact: bool) -> Any:
    """Return a trainer that has trained for one epoch."""
    trainer = make_trainer(
        folder / "out",
        scored("dropout"),
        train=samples(15),
        exact_reduction=exact,
        save_strategy="no",
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Threads that ask for the interpreter are given it only when this one waits, as on a busy machine.
    sys.setswitchinterval(60)
    place = Path(sys.argv[1])
    atexit.register(left, place)  # the first to be registered is the last to be called
    kept = train(place, exact="exact" in sys.argv)
    if "kept" not in sys.argv:
        del kept
    if "destroyed" in sys.argv:
        torch.distributed.destroy_process_group()
