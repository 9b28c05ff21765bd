"""Functions on their way into CUDA graphs: run, rehearsed, recorded, replayed; for every shape anew."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from trainstep import tree
from trainstep.errors import CaptureError
from trainstep.graphs import Recording, record
from trainstep.rehearsal import rehearse
from trainstep.rng import Key


@define(eq=False)
class Stages:
    """A function on its way into a graph: run, rehearsed, recorded, from then on replayed.

    Attributes:
        device: where it runs.
        pool: memory shared by graphs that are replayed in turn.
        inputs: tensors that the recording reads.
        recording: once there is one.
    """

    device: torch.device
    pool: Any
    inputs: list[Tensor] = field(factory=list)
    recording: Recording | None = None
    _calls: int = 0
    _paths: list[tuple[int, ...]] = field(factory=list)

    def __call__(self, fn: Callable[[Any], Any], root: Key) -> Any:
        """Run ``fn(root)``, in the way of the stage that is reached."""
        self._calls += 1
        if self._calls == 1:
            return fn(root)
        if self._calls == 2:
            outputs, self._paths = rehearse(fn, root, self.device)
            return outputs
        if self.recording is None:
            self.recording = record(fn, self._paths, self.device, self.pool)
        return self.recording.replay(root)

    @property
    def static(self) -> bool:
        """Whether the next call reads ``inputs`` rather than what it is given."""
        return self._calls >= 2


class Note(str):
    """Says something of a batch: those of which other things are said are recorded apart."""

    __slots__ = ()


@define(eq=False)
class Inputs:
    """Functions of a batch, recorded once for every structure and shape.

    Attributes:
        device: where they run.
        pool: memory shared with other graphs.
        limit: how many shapes are recorded; further ones run as they are, after one warning.
    """

    device: torch.device
    pool: Any
    limit: int
    _stages: dict[Hashable, Stages] = field(factory=dict)
    _shapes: set[tuple[tuple[int, ...], ...]] = field(factory=set)
    _full: bool = False

    @property
    def recorded(self) -> bool:
        """Whether anything is recorded."""
        return any(stages.recording is not None for stages in self._stages.values())

    def __call__(self, fn: Callable[[Any, Any], Any], batch: Any, root: Key) -> Any:
        """Run ``fn(batch, root)``; its outputs may be overwritten by the next call."""
        leaves: list[Any] = []
        key = signature(batch, leaves)
        stages = self._stages.get(key)
        if stages is None:
            if len(self._stages) >= self.limit:
                self._warn(batch, leaves)
                return fn(batch, root)
            stages = self._stages[key] = Stages(self.device, self.pool)
            self._shapes.add(_shapes(leaves))
        if not stages.static:
            return stages(lambda key: fn(batch, key), root)
        if not stages.inputs:
            stages.inputs = [torch.empty_like(leaf, device=self.device) for leaf in leaves]
        for static, tensor in zip(stages.inputs, leaves, strict=True):
            static.copy_(tensor, non_blocking=True)
        if stages.recording is not None:
            return stages.recording.replay(root)
        waiting = iter(stages.inputs)
        placed = tree.map(lambda leaf: next(waiting) if isinstance(leaf, Tensor) else leaf, batch)
        return stages(lambda key: fn(placed, key), root)

    def _warn(self, batch: Any, leaves: list[Tensor]) -> None:
        if self._full:
            return
        self._full = True
        shapes = _shapes(leaves)
        others = [leaf for leaf in tree.flatten(batch)[0] if not isinstance(leaf, Tensor)]
        notes = [leaf for leaf in others if isinstance(leaf, Note)]
        if shapes in self._shapes and notes:
            reason = (
                f"a batch of which {', '.join(notes)} is of another kind than the {self.limit} that are "
                "recorded; from now on new kinds run without a graph."
            )
        elif shapes in self._shapes:
            values = ", ".join(map(repr, others))
            reason = (
                f"the batch holds what is no tensor ({values}), which a recording takes for a part of the "
                f"step, in other values than the {self.limit} that are recorded; from now on other values "
                "run without a graph. Make them tensors, or leave them out of the batch."
            )
        else:
            reason = (
                f"the batch ({', '.join(map(str, shapes))}) has another shape than the {self.limit} that "
                "are recorded; from now on new shapes run without a graph. Pad to a few lengths "
                "(pad_to_multiple_of) to have fewer."
            )
        warnings.warn(f"capture: {reason}", stacklevel=4)


def as_input(batch: Any) -> Any:
    """Return a batch as ``Inputs`` takes it: a dict as it is, which saves a walk; else ``tree.plain``."""
    return batch if type(batch) is dict else tree.plain(batch)


def _shapes(tensors: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def signature(value: Any, tensors: list[Tensor]) -> Hashable:
    """Describe the structure and shapes of a batch, and append its tensors to ``tensors`` in tree order.

    Written out, because it runs in every step, and the pytree's own takes five times as long.

    Raises:
        CaptureError: for NumPy arrays, whose numbers would be taken for part of the step.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if type(value) is dict:
        return tuple([(name, signature(part, tensors)) for name, part in value.items()])
    if type(value) in (list, tuple):
        return type(value), tuple([signature(part, tensors) for part in value])
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, np.ndarray):
        raise CaptureError(
            f"the batch holds a NumPy array of shape {value.shape}, which a step that is recorded or "
            "compiled as a whole would not read again. Make it a tensor."
        )
    leaves, spec = tree.flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return repr(value)
    return spec, tuple([signature(leaf, tensors) for leaf in leaves])
