"""``trainstep``: look at checkpoints, verify and compare them, replay runs, find where two runs part."""

from trainer.cli.entry import main

__all__ = ["main"]
