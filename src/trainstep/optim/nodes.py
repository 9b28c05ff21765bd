"""Finding what an optimizer keeps inside the nested states of ``partition``, ``chain`` and wrappers."""

from collections.abc import Iterator
from typing import Any

from trainstep.state import TrainState
from trainstep.types import OptState, Params

Source = TrainState | OptState
"""A ``TrainState``, or the ``opt_state`` of one."""

_MARKS = {"ema": "average", "schedule_free": "z"}
# What a node of each kind holds: a partition may have a label of the same name.


def find_nodes(opt_state: OptState, kind: str) -> list[dict[str, Any]]:
    """Return the outermost records of one kind (``"ema"`` or ``"schedule_free"``) in a state."""
    return list(_walk(opt_state, kind))


def unpack(
    where: str, state: Source, params: Params | None, *, needed: bool = True
) -> tuple[OptState, Params]:
    """Return ``(opt_state, params)`` of a ``TrainState``, or of an ``opt_state`` and its parameters.

    Raises:
        ValueError: if a bare ``opt_state`` comes without parameters that are ``needed``.
    """
    if isinstance(state, TrainState):
        return state.opt_state, state.params if params is None else params
    if params is None and needed:
        raise ValueError(
            f"optim.{where}: an opt_state needs its parameters: {where}(opt_state, params); "
            "or give the TrainState"
        )
    return state, params or {}


def _walk(value: Any, kind: str) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        node = value.get(kind)
        if isinstance(node, dict) and isinstance(node.get(_MARKS[kind]), dict):
            yield node
            return
        value = list(value.values())
    if isinstance(value, list | tuple):
        for child in value:
            yield from _walk(child, kind)
