"""Tensors of which each process holds a part (``torch.distributed.tensor.DTensor``): whole, measured.

The step's arithmetic is elementwise and runs on such tensors as on any; what needs all entries of a tensor
at once is here. These functions exchange data: all processes that hold parts must call them, alike.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(leaf: Any) -> bool:
    """Tell whether a leaf is a tensor of which this process holds a part."""
    kind = type(leaf)  # plain tensors and parameters, the usual ones, cost no look-up that fails
    return kind is not Tensor and kind is not torch.nn.Parameter and hasattr(leaf, "placements")


def whole(leaf: Any) -> Any:
    """Return a tensor with all its entries, from all processes; any other leaf as it is."""
    if not is_sharded(leaf):
        return leaf
    # Parts that are kept on the host travel between the devices of the mesh.
    return leaf.to(leaf.device_mesh.device_type).full_tensor().to(leaf.device)


def local(leaf: Any) -> Any:
    """Return this process's part of a tensor, sharing its memory; any other leaf as it is."""
    return leaf.to_local() if is_sharded(leaf) else leaf


@torch.no_grad()  # else autograd records how a part is taken out of its tensor
def norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, with all entries of those that are in parts.

    Tensors are of one device and dtype. Parts are measured here and their squares added up over the
    processes: one operation for all tensors that lie on the same mesh, and no copy of any of them. The
    norms carry no gradient.
    """
    measured = list(torch._foreach_norm([local(tensor) for tensor in tensors]))
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            groups.setdefault(_parted_over(tensor), []).append(place)
    for (mesh, dimensions), places in groups.items():
        # In float64, since the square of a number need not fit into the number's own type.
        squares = torch.stack([measured[place] for place in places]).double().square_()
        squares = squares.to(mesh.device_type)  # from where parts may be kept, see ``whole``
        for dimension in dimensions:
            dist.all_reduce(squares, group=mesh.get_group(dimension))
        together = squares.sqrt_().to(measured[places[0]])
        for place, norm in zip(places, together.unbind(), strict=True):
            measured[place] = norm
    return measured


def _parted_over(tensor: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the mesh, and its dimensions over which the entries are distributed."""
    parts = tuple(n for n, placement in enumerate(tensor.placements) if placement.is_shard())
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"global_norm: a tensor of shape {tuple(tensor.shape)} holds sums that are still to be added "
            f"up over processes ({tensor.placements}); redistribute it first"
        )
    return tensor.device_mesh, parts
