"""The tensors that recorded steps read and write, and what is taken out of them before the next replay."""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.state import TrainState, parts
from trainstep.types import Metrics

Packed = tuple[list[tuple[list[str], Tensor]], Metrics]
"""Metrics on the device, stacked by dtype and shape under their names, and those on the host."""


def pack(metrics: Metrics) -> Packed:
    """Stack metrics, so that one copy takes them out of the tensors that the next replay overwrites."""
    runs: dict[Any, list[str]] = {}
    for name, value in metrics.items():
        if value.is_cuda:
            runs.setdefault((value.dtype, value.shape), []).append(name)
    stacks = [(names, torch.stack([metrics[n] for n in names])) for names in runs.values()]
    return stacks, {name: value for name, value in metrics.items() if not value.is_cuda}


def unpack(packed: Packed) -> Metrics:
    stacks, metrics = packed
    metrics = dict(metrics)
    for names, values in stacks:
        metrics.update(zip(names, values.clone().unbind(), strict=True))
    return metrics


def settled(home: TrainState, result: TrainState) -> bool:
    """Write ``result`` into the tensors of ``home``; False, and nothing done, where it does not fit.

    It does not fit in the first step at most, in which transforms and guards begin to remember.
    """
    mine, spec = tree.flatten(parts(home))
    theirs, their_spec = tree.flatten(parts(result))
    if spec != their_spec or not all(map(fits, mine, theirs)):
        return False
    copy(mine, theirs)
    return True


def fits(mine: Any, other: Any) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(other, Tensor):
        return bool(type(mine) is type(other) and mine == other)
    return mine.shape == other.shape and mine.dtype == other.dtype and mine.device == other.device


def copy(mine: list[Any], others: list[Any]) -> None:
    with torch.no_grad():
        for target, source in zip(mine, others, strict=True):
            if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                target.copy_(source)


def on_device(batch: Any, device: torch.device) -> Any:
    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.device != device:
            return leaf.to(device, non_blocking=True)
        return leaf

    return tree.map(place, batch)
