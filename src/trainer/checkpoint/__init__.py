"""Checkpoints: written whole or not at all, verified when read, rotated only when safe.

``save`` writes ``checkpoint-<step>`` from ``Contents``, ``load`` reads one back as ``Loaded``, ``newest``
finds the one to resume from. No pickle anywhere. ``BackgroundWriter`` saves beside training.
"""

from trainer.checkpoint import host_rng
from trainer.checkpoint.background import BackgroundWriter
from trainer.checkpoint.consolidate import consolidate
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.errors import CheckpointError, NoCheckpoint
from trainer.checkpoint.layout import checkpoint_dir, list_checkpoints
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.pieces import is_in_pieces
from trainer.checkpoint.place import tidy
from trainer.checkpoint.reader import Loaded, is_checkpoint, load, newest, open_lazily, verify
from trainer.checkpoint.rotation import rotate
from trainer.checkpoint.writer import save

__all__ = [
    "BackgroundWriter",
    "CheckpointError",
    "Contents",
    "Loaded",
    "Manifest",
    "NoCheckpoint",
    "checkpoint_dir",
    "consolidate",
    "host_rng",
    "is_checkpoint",
    "is_in_pieces",
    "list_checkpoints",
    "load",
    "newest",
    "open_lazily",
    "rotate",
    "save",
    "tidy",
    "verify",
]
