"""Export the state of callbacks to a checkpoint, and restore it from there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .control import TrainerControl

logger = logging.getLogger(__name__)

State = Mapping[str, Any]
"""What `ExportableState.state` returns: ``{"args": {...}, "attributes": {...}}``."""


def is_exportable(obj: Any) -> bool:
    """Tell whether `obj` has the two methods of `ExportableState`, of whichever library it is."""
    kind = type(obj)
    return callable(getattr(kind, "state", None)) and callable(getattr(kind, "from_state", None))


def export_states(objects: Iterable[Any]) -> dict[str, Any]:
    """Return class name -> state, or class name -> list of states if a class has several objects.

    The result is built anew, so exporting again never adds to what an earlier export held.

    Raises:
        TypeError: An object is not exportable, or its ``state()`` has not the expected form.
    """
    grouped: dict[str, list[Any]] = {}
    for obj in objects:
        name = type(obj).__name__
        if not is_exportable(obj):
            raise TypeError(
                f"cannot export the state of {name}: only objects that inherit ExportableState "
                "can be saved; let the class inherit it and define state()"
            )
        state = obj.state()
        if not isinstance(state, Mapping) or not {"args", "attributes"} <= state.keys():
            raise TypeError(
                f'{name}.state() must return {{"args": {{...}}, "attributes": {{...}}}}, '
                f"got {state!r}"
            )
        grouped.setdefault(name, []).append(state)
    return {name: states[0] if len(states) == 1 else states for name, states in grouped.items()}


def export_callback_states(callbacks: Iterable[Any], control: Any) -> dict[str, Any]:
    """Export the callbacks that are exportable, and `control`; the others are left out."""
    return export_states([*filter(is_exportable, callbacks), control])


def restore_callback_states(
    callbacks: list[Any], control: TrainerControl, stored: Mapping[str, Any]
) -> TrainerControl:
    """Give callbacks and `control` the states of a checkpoint, several of one class in order.

    Each object keeps its place in `callbacks` and its identity. (Only objects with ``__slots__``
    are replaced by new ones, in the same place.) What is stored but not present is left alone and
    warned of by name.

    Args:
        callbacks: The list of callbacks, changed in place.
        control: The control object in use.
        stored: ``TrainerState.stateful_callbacks`` of the checkpoint.

    Returns:
        The control object to use from here on.

    Raises:
        TypeError: A class cannot be built from the arguments that were stored for it.
    """
    objects = [*callbacks, control]
    missing = []
    for name, states in stored.items():
        places = [
            index
            for index, obj in enumerate(objects)
            if type(obj).__name__ == name and is_exportable(obj)
        ]
        chosen = _states_for(name, [states] if isinstance(states, Mapping) else states, len(places))
        if not places:
            missing.append(name)
        for index, state in zip(places, chosen, strict=False):
            objects[index] = _restored(objects[index], state)
    if missing:
        logger.warning(
            "the checkpoint holds states of callbacks that this Trainer does not have: %s. "
            "They are ignored; pass those callbacks to the Trainer to restore them.",
            ", ".join(missing),
        )
    callbacks[:] = objects[:-1]
    restored_control: TrainerControl = objects[-1]
    return restored_control


def _states_for(name: str, states: Sequence[State], count: int) -> Sequence[State]:
    """Choose which of the stored states the `count` present objects of a class take, in order."""
    if count == 0 or len(states) == count:
        return states
    if count > 1 and len(states) % count == 0:
        # transformers appends all states again at each save instead of replacing them, so that
        # the newest are the last ones.
        return states[-count:]
    logger.warning(
        "the checkpoint holds %d state(s) of %s and this Trainer has %d; "
        "the first %d are restored in order.",
        len(states),
        name,
        count,
        min(len(states), count),
    )
    return states


def _restored(obj: Any, state: State) -> Any:
    """Return `obj` with the stored state, or a new object where `obj` cannot take it over."""
    kind = type(obj)
    try:
        fresh = kind.from_state(state)
    except (AttributeError, KeyError, TypeError) as error:
        raise TypeError(
            f"cannot restore {kind.__name__} from the checkpoint: building it from "
            f"{dict(state)!r} failed ({error!r}). The keys of state()['args'] must be arguments of "
            "its constructor."
        ) from error
    if any(getattr(base, "__slots__", ()) for base in kind.__mro__):
        return fresh
    vars(obj).update(vars(fresh))
    return obj
