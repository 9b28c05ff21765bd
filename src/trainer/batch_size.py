"""Finding a batch size that fits into memory, each attempt from the same beginning."""

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import trainstep as ts
from trainer.memory import empty_cache

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Restore = Callable[[], None]

_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS; with or without PyTorch's own allocator
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says when its workspace does not fit
    "MODULE:PT_DEVMEM Allocation failed",  # HPU
)


def find_executable_batch_size(
    run: Callable[[int], Result],
    start: int,
    *,
    snapshot: Callable[[], Restore],
    device: torch.device | str = "cpu",
) -> Result:
    """Call ``run(size)``, with nine tenths of the size (rounded down) after each lack of memory.

    Args:
        run: one attempt.
        start: the first size.
        snapshot: called once, before the first attempt; returns what puts everything back that an
            attempt changes. That is called before every further attempt.
        device: whose allocator's cache is emptied in between.

    Returns:
        What ``run`` returned.

    Raises:
        RuntimeError: if not even a single sample fits.
        ValueError: if ``start`` is below 1.

    Any other error of ``run`` is passed on.
    """
    if start < 1:
        raise ValueError(f"the batch size to begin with must be at least 1, got {start}")
    restore = snapshot()
    size = start
    while True:
        try:
            return run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller, reason = size * 9 // 10, str(error).partition("\n")[0]
            if smaller == 0:
                raise RuntimeError(
                    f"auto_find_batch_size: no batch size fits into memory; from {start} it went down "
                    "to 1. Use a smaller model, shorter samples, gradient_checkpointing=True or "
                    "bf16=True."
                ) from error
        # Only here, with the error gone, are the frames gone that held the attempt's tensors.
        logger.warning(
            "A batch of %d does not fit into memory (%s). Training starts anew, from the initial "
            "weights and optimizer state, with batches of %d.",
            size,
            reason,
            smaller,
        )
        gc.collect()
        empty_cache(device)
        restore()
        size = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device, or the CPU's allocator, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def remember(module: nn.Module, *trees: Any) -> Restore:
    """Copy a module's tensors, and those of pytrees, to host memory.

    Args:
        module: its parameters and buffers are copied, shared ones once.
        trees: further tensors, such as an optimizer state.

    Returns:
        A function that writes the copies back into the very tensors they were made of, however often it
        is called, and gives these back to a module that has replaced them.
    """
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (slot, name, tensor)
        for part in module.modules()
        for slot in (part._parameters, part._buffers)
        for name, tensor in slot.items()
        if tensor is not None
    ]
    leaves = [leaf for leaf in ts.tree.leaves(trees) if isinstance(leaf, Tensor)]
    originals = {id(tensor): tensor for tensor in [*(slot[2] for slot in slots), *leaves]}
    copies = {key: t.detach().to("cpu", copy=True) for key, t in originals.items()}

    def restore() -> None:
        for slot, name, tensor in slots:
            slot[name] = tensor
        with torch.no_grad():
            for key, tensor in originals.items():
                tensor.copy_(copies[key])

    return restore
