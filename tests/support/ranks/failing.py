"""Two processes, of which the second raises, is killed or is late in the third update."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from support.ranks.launch import report
from support.shell import At, make_trainer, samples, scored
from trainer.distributed import PeerFailure

TIMEOUT = 5  # seconds, ddp_timeout


def fail(how: str) -> Any:
    """Return what the second process does."""

    def act(control: Any) -> None:
        if how == "raise":
            raise KeyError("something of the user's")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    return act


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    second = os.environ["RANK"] == "1"
    callbacks = [At("step_begin", 2, fail(how))] if second else []
    trainer = make_trainer(
        folder / "out", scored("mlp"), train=samples(40), callbacks=callbacks, ddp_timeout=TIMEOUT
    )
    for callback in callbacks:
        callback.same_on_all_ranks = True
    began = time.monotonic()
    try:
        trainer.train()
    except PeerFailure as error:
        report(folder, {"error": str(error), "waited": time.monotonic() - began})
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
