"""Upstream's module of this name: what looks for the place where numbers overflow."""

from trainer.arguments import DebugOption as DebugOption
from trainer.debug import DebugUnderflowOverflow as DebugUnderflowOverflow
