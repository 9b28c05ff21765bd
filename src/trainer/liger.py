"""Liger kernels: a library's Triton kernels put into a model of transformers, in place."""

import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer import modeling

logger = logging.getLogger(__name__)

_OLDEST = (0, 3)


def check_installed() -> Any:
    """Import the library and return its part for transformers.

    Raises:
        ImportError: if it is missing, too old, or cannot work here, naming what to install.
    """
    try:
        library = importlib.import_module("liger_kernel.transformers")
        _check_version()
    except ImportError as error:
        raise ImportError(
            f"use_liger_kernel=True needs the package liger-kernel, which needs Triton ({error}). To "
            "install it: pip install 'trainstep[liger]'"
        ) from error
    return library


def apply(model: Any, config: Mapping[str, Any] | None) -> None:
    """Patch a model in place; one that is not a ``PreTrainedModel`` is left as it is, with a warning.

    Args:
        model: PyTorch's wrappers and PEFT's are looked through.
        config: which kernels to use, such as ``{"rope": False}``; None takes the library's choice.
    """
    library = check_installed()
    inner = modeling.without_adapters(model)
    # Who has such a model has imported transformers.
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(inner, transformers.PreTrainedModel):
        logger.warning(
            "use_liger_kernel: %s is not a PreTrainedModel of transformers, so no kernel is replaced",
            type(inner).__name__,
        )
        return
    library._apply_liger_kernel_to_instance(model=inner, **(config or {}))


def _check_version() -> None:
    with suppress(importlib.metadata.PackageNotFoundError):  # a source tree on the path has none
        version = importlib.metadata.version("liger-kernel")
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
            raise ImportError(f"version {version} is installed, 0.3.0 or newer is needed")
