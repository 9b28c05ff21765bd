"""``trainstep consolidate``: the model of a checkpoint in pieces as one file."""

import argparse
from pathlib import Path

from trainer.cli.result import SAME, Refusal, Result, size

SUMMARY = "write one model.safetensors from a checkpoint in pieces"
DESCRIPTION = """\
Put together the weights of a checkpoint that sharded training (fsdp) wrote in
pieces, into one model.safetensors that from_pretrained takes. One tensor at a
time is in memory, and every piece is verified when it is read. The checkpoint
itself stays what it was, and can still be resumed."""
EPILOG = """\
examples:
  trainstep consolidate runs/a/checkpoint-100
  trainstep consolidate runs/a/checkpoint-100 --out exported"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of a checkpoint")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write, with copies of the model's other files; CKPT itself if left out",
    )


def run(options: argparse.Namespace) -> Result:
    """Write the file."""
    from trainer.checkpoint import CheckpointError, consolidate
    from trainer.cli.reading import checkpoint_at

    path = checkpoint_at(options.checkpoint)
    try:
        written = consolidate(path, options.out)
    except CheckpointError as error:
        raise Refusal(str(error)) from None
    bytes_ = written.stat().st_size
    data = {
        "command": "consolidate",
        "checkpoint": str(path),
        "model": str(written),
        "size": bytes_,
    }
    return Result(SAME, data, [f"{written}: {size(bytes_)}"])
