"""The tensors of a tree in one buffer, so that they travel together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainstep import tree as pytree
from trainstep.ranks import device_of

_ALIGNMENT = 64
"""Bytes. Kernels reduce in another order from addresses that are no multiple of the vector width."""


def exchange(
    where: str,
    tree: Any,
    channel: Any,
    act: Callable[[Tensor], Callable[[], Tensor]],
    *,
    summed: bool = False,
    multiple: int = 1,
) -> Any:
    """Apply ``act`` to a tree's tensors, laid out in one new buffer for each device and dtype.

    ``act`` starts an exchange of the buffer, which it may overwrite, and returns what finishes it; that
    gives a tensor whose last axis has the layout of the buffer. All are started before any is finished.
    The length of buffers is a multiple of ``multiple``.
    """
    leaves, spec = pytree.flatten(tree)
    home = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
    kinds: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if leaf is None:
            continue
        refusal = _refusal(leaf)
        if refusal is not None:
            path = pytree.leaves_with_paths(tree)[place][0] or "the leaf"
            raise refusal[0](f"{where}: {path} {refusal[1]}")
        leaves[place] = tensor = _tensor(leaf, home or device_of(channel), summed)
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    with torch.no_grad():
        packed = [
            _packed([leaves[place] for place in places], multiple) for places in kinds.values()
        ]
        started = [(act(flat), starts) for flat, starts in packed]
        del packed  # so that an exchange can free its buffer
        for (finish, starts), places in zip(started, kinds.values(), strict=True):
            flat = finish()
            for place, start in zip(places, starts, strict=True):
                tensor = leaves[place]
                piece = flat[..., start : start + tensor.numel()]
                leaves[place] = piece.reshape((*flat.shape[:-1], *tensor.shape))
    return pytree.unflatten(leaves, spec)


def _packed(tensors: Sequence[Tensor], multiple: int) -> tuple[Tensor, list[int]]:
    """Copy tensors of one kind into a new buffer; returns it and where each begins."""
    step = _ALIGNMENT // tensors[0].element_size()
    zeros = tensors[0].new_zeros(max(step, multiple))
    pieces: list[Tensor] = []
    starts: list[int] = []
    end = 0
    for tensor in tensors:
        gap = -tensor.numel() % step
        starts.append(end)
        pieces += [tensor.detach().reshape(-1), zeros[:gap]]
        end += tensor.numel() + gap
    return torch.cat([*pieces, zeros[: -end % multiple]]), starts


def _tensor(leaf: Any, device: torch.device, summed: bool) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.to(torch.int64) if summed and leaf.dtype == torch.bool else leaf
    dtype = torch.float64 if isinstance(leaf, float) else torch.int64
    if isinstance(leaf, bool) and not summed:
        dtype = torch.bool
    return torch.full((), leaf, dtype=dtype, device=device)


def _refusal(leaf: Any) -> tuple[type[Exception], str] | None:
    """Return why a leaf cannot travel, and the kind of error that this is; None if it can."""
    if isinstance(leaf, Tensor):
        if leaf.requires_grad and torch.is_grad_enabled():
            return ValueError, (
                "requires a gradient, which does not pass between ranks; call detach() on it, or "
                "exchange gradients instead"
            )
        if leaf.layout is not torch.strided or hasattr(leaf, "placements"):
            return TypeError, (
                f"is a {type(leaf).__name__} of layout {leaf.layout}; only dense tensors that are whole on "
                "each rank can be exchanged"
            )
    elif not isinstance(leaf, bool | int | float):
        return TypeError, f"is a {type(leaf).__name__}; leaves must be tensors, numbers or None"
    return None
