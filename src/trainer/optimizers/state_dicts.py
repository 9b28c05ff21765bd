"""An optimizer's state as ``torch.optim`` writes it: by the parameters' place in the groups."""

from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer.optimizers.adopt import Adopted
from trainstep.types import OptState

# Kept by PyTorch's classes where the core's kernels have no use for it, and the reverse.
_COUNTER = "step"


def to_state_dict(adopted: Adopted, opt_state: OptState, step: int) -> dict[str, Any]:
    """Return what ``state_dict()`` of the torch optimizer would be; tensors are those of the state.

    Args:
        adopted: the optimizer.
        opt_state: its state.
        step: updates done.
    """
    packed: dict[str, Any] = adopted.object.state_dict()
    if not adopted.translated:
        return packed
    state: dict[int, dict[str, Any]] = {}
    for number, name, place in _places(adopted):
        kept = opt_state.get(f"group{number}", {})
        entry: dict[str, Any] = {
            key: values[name] for key, values in kept.items() if name in values
        }
        if entry and isinstance(adopted.object, torch.optim.RMSprop):
            entry = {_COUNTER: torch.tensor(float(step)), **entry}
        if isinstance(adopted.object, torch.optim.SGD) and _COUNTER in entry:
            # PyTorch takes any buffer for one that was used.
            entry = {} if entry.pop(_COUNTER).item() == 0 else entry
        if entry:
            state[place] = entry
    return {"state": state, "param_groups": packed["param_groups"]}


def from_state_dict(
    adopted: Adopted, saved: dict[str, Any], fresh: OptState, step: int
) -> OptState:
    """Return the pure state for what ``state_dict()`` returned; the inverse of ``to_state_dict``.

    Options in the groups, learning rate and weight decay among them, stay those of ``adopted`` if the
    core's kernels do the work; an object that runs itself is given what was saved.

    Args:
        adopted: the optimizer, with the groups that the saved one had.
        saved: the state dict. It may lack parameters that never had a gradient.
        fresh: the state of ``adopted`` at the start, on the devices where it is to be.
        step: updates done, for counters that were not saved.

    Raises:
        ValueError: if groups, names or shapes differ.
    """
    sizes = [len(group["params"]) for group in adopted.object.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != theirs:
        raise ValueError(
            f"the saved optimizer has groups of {theirs} parameters, this one of {sizes}; train the "
            "same model, with the same parameters frozen and the same weight_decay groups"
        )
    if not adopted.translated:
        adopted.object.load_state_dict(saved)
        return adopted.current(fresh)
    result = ts.tree.clone(fresh)
    for number, name, place in _places(adopted):
        kept = saved["state"].get(place)
        if kept:
            _fill(result[f"group{number}"], name, kept, step)
    return result


def _places(adopted: Adopted) -> list[tuple[int, str, int]]:
    """Return (group, name, place over all groups) of every parameter that trains."""
    found, place = [], 0
    for number, group in enumerate(adopted.object.param_groups):
        for parameter in group["params"]:
            if parameter in adopted._names:
                found.append((number, adopted._names[parameter], place))
            place += 1
    return found


def _fill(group: dict[str, Any], name: str, kept: dict[str, Any], step: int) -> None:
    given = {key: value for key, value in kept.items() if value is not None}
    missing = sorted(group.keys() - given.keys() - {_COUNTER})
    extra = sorted(given.keys() - group.keys() - {_COUNTER})
    if missing or extra:
        raise ValueError(
            f"the saved optimizer keeps {', '.join(sorted(given))} for {name}, this one "
            f"{', '.join(sorted(group))}; use the optimizer that the checkpoint was made with"
        )
    for key, values in group.items():
        value = torch.as_tensor(given.get(key, step), dtype=values[name].dtype)
        _check_shape(name, key, value, values[name])
        values[name].copy_(value)


def _check_shape(name: str, key: str, value: Tensor, mine: Tensor) -> None:
    if value.shape != mine.shape:
        raise ValueError(
            f"the saved {key} of {name} has the shape {tuple(value.shape)}, expected "
            f"{tuple(mine.shape)}; the checkpoint is of another model"
        )
