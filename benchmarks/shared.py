"""What benchmarks share: options that are checked, what was measured on what, tables in Markdown."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "lightning", "pytorch-lightning", "jax")
LIGHTNING = ("lightning", "pytorch_lightning")


def at_least(least: int) -> Callable[[str], int]:
    """Return the ``type`` of an option that is a whole number, and not less than ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def need_cuda() -> None:
    """End with a line that says what is missing where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"This needs a CUDA device; torch {torch.__version__} finds none.")


def import_lightning() -> Any:
    """Return Lightning, which comes as either of two packages.

    Raises:
        ImportError: naming both, if neither is installed.
    """
    for name in LIGHTNING:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ImportError(f"neither of {' and '.join(LIGHTNING)} is installed")


def versions(device: str) -> dict[str, str]:
    """Return what is measured, and on what.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    import torch

    if device == "cuda":
        named = torch.cuda.get_device_name()
    else:
        named = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found = {"device": named, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the least and the greatest of values in words."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose heading is the first of ``rows``."""
    heading, *others = rows
    lines = [f"| {' | '.join(row)} |" for row in (heading, *others)]
    lines.insert(1, "|---" * len(heading) + "|")
    return "\n".join(lines)
