"""Groups of processes: those beside the default one, and the end of all of them."""

import gc
import sys
import time
import weakref
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist

# Groups beside the default one by what they are for, after the default group that each belongs to.
_beside: dict[str, tuple[Any, Any]] = {}
# Seconds in which a thread that has nothing more to send comes to rest, also on a busy machine.
_REST = 0.1


def beside(purpose: str, timeout: timedelta) -> Any:
    """Return a group of all processes over the host (gloo) for one purpose; all must call."""
    world = dist.group.WORLD
    if purpose not in _beside or _beside[purpose][0] is not world:
        _beside[purpose] = world, dist.new_group(backend="gloo", timeout=timeout)
    return _beside[purpose][1]


def take_down() -> None:
    """Destroy all groups, and see that their threads have ended or rest.

    A thread of gloo lets go of tensors after it has said that they are sent, and needs the interpreter
    for that. If it waits for an interpreter that shuts down, Python ends it inside a destructor, upon
    which C++ aborts the process. It ends well with the last reference to its group, and that may outlive
    ``destroy_process_group``.
    """
    # Kept until nobody else has them: C++ that drops the last reference to a group may wait for threads
    # while it has the interpreter for which they wait.
    held = {*dist.distributed_c10d._world.pg_map, *chain(*_beside.values()), *_forgotten()}
    _beside.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a trainer that nobody has any more refers to itself, and to groups
    alive = [weakref.ref(group) for group in held]
    held.clear()
    if any(group() is not None for group in alive):
        time.sleep(_REST)


def _forgotten() -> list[Any]:
    """Let functions of PyTorch forget the groups that they have as default arguments; return these.

    That is the default group of the time at which they were imported, which the first optimizer may cause.
    Without it they take the one that there is.
    """
    found = []
    module = sys.modules.get("torch.distributed.nn.functional")
    for function in list(vars(module).values()) if module else []:
        given = getattr(function, "__defaults__", None) or ()
        groups = [value for value in given if isinstance(value, dist.ProcessGroup)]
        if groups:
            found += groups
            function.__defaults__ = tuple(
                None if isinstance(value, dist.ProcessGroup) else value for value in given
            )
    return found
