"""Which ranks take part in a collective, and which of them this process is."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup``, a ``DeviceMesh`` of one dimension, or None."""


def size(group: Group = None) -> int:
    """Return how many ranks there are; 1 without a process group."""
    found = resolve("size", group)
    return 1 if found is None else dist.get_world_size(found)


def rank(group: Group = None) -> int:
    """Return the number of this process in the group, from 0; 0 without a process group."""
    found = resolve("rank", group)
    return 0 if found is None else dist.get_rank(found)


def check_power_of_two(where: str, ranks: int) -> None:
    """Raise ValueError unless a binary tree can be split among so many ranks."""
    if ranks & (ranks - 1):
        raise ValueError(
            f"{where}: the number of ranks must be a power of two, so that each holds a subtree; got "
            f"{ranks}. Start {1 << (ranks.bit_length() - 1)} or {1 << ranks.bit_length()} processes, or "
            "use psum, whose bits depend on the number of ranks."
        )


def resolve(where: str, group: Group) -> Any:
    """Return the process group, or None if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError(f"{where}: torch.distributed is not initialised, so there is no group")
        return None
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            hint = f'mesh["{names[0]}"]' if names else 'mesh["name"], of a mesh with mesh_dim_names'
            raise ValueError(
                f"{where}: a device mesh must have one dimension here, got {group.ndim}; take one of "
                f"them: {hint}"
            )
        return group.get_group()
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{where}: this process, rank {dist.get_rank()}, is not in the group; only its members may call"
        )
    return group


def shared(channel: Any) -> bool:
    """Tell whether there is another rank."""
    return channel is not None and dist.get_world_size(channel) > 1


def at_once() -> bool:
    """Tell whether exchanges may run side by side: a graph of ``torch.compile`` waits for each."""
    return not torch.compiler.is_compiling()


def wait(work: Any) -> None:
    """Wait for an exchange under way, if there is one."""
    if work is not None:
        work.wait()


def gather(result: Tensor, mine: Tensor, channel: Any) -> None:
    """Put every rank's ``mine`` one after the other into ``result``."""
    # Newer releases rename the function and warn of the older name.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(result, mine, group=channel)


def device_of(channel: Any) -> torch.device:
    """Return where numbers of a tree without tensors travel from."""
    if channel is not None and dist.get_backend(channel) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def unrecordable(group: Group = None) -> str | None:
    """Say why exchanges of CUDA tensors cannot be in a CUDA graph, and what to do; None if they can be."""
    channel = resolve("capture", group)
    if not shared(channel):
        return None
    backends = dist.get_backend_config(channel)
    if "cuda:nccl" not in backends.split(","):
        # Others exchange on the host, where a replay would never come.
        return (
            f"ranks exchange tensors through {backends}, and only NCCL can be recorded. Make the group "
            'with backend="nccl"'
        )
    return None
