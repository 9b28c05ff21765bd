"""How much space a save needs, asked before anything is written."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.errors import CheckpointError

_SLACK = 1 << 16
"""Bytes for the model's configuration and other small files."""
_PER_TENSOR = 1 << 10
"""Bytes that one tensor takes in headers, in the description of the state and in the manifest."""


def estimate(tensors: Iterable[Tensor], texts: Iterable[bytes]) -> int:
    """Return the bytes that a checkpoint of these tensors and files takes, with some to spare."""
    needed = _SLACK + sum(map(len, texts))
    for tensor in tensors:
        needed += tensor.numel() * tensor.element_size() + _PER_TENSOR
    return needed


def check(root: Path, needed: int) -> None:
    """Check that ``needed`` bytes can be written where ``root`` lies.

    Older checkpoints are not counted as space: none is deleted before the new one is safe, not even the
    one that it replaces.

    Raises:
        CheckpointError: if they cannot; nothing was written.
    """
    free = io.free_bytes(root)
    if free < needed:
        raise CheckpointError(
            f"{root}: saving needs about {needed} bytes ({_readable(needed)}), {free} are free "
            f"({_readable(free)}); nothing was written and nothing deleted. Free some space, lower "
            "save_total_limit, or use save_only_model"
        )


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
