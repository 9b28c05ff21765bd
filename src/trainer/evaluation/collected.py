"""What is kept of all batches, and how it is joined."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from trainer.evaluation.nested import compact, detached, to_numpy

PADDING = -100

_APART = "or set eval_do_concat_batches=False to keep one entry per batch"


@define(eq=False)
class Collected:
    """One kind of output of all batches, kept as a list and joined once at the end.

    Attributes:
        what: its name, for messages.
        concatenate: join along the first axis; False keeps one entry per batch.
        every: move what has been collected to the host after that many batches; None at the end.
        padding: fills rows up to the width of the widest batch.
        objects: lists hold one Python object per sample.
    """

    what: str
    concatenate: bool = True
    every: int | None = None
    padding: int = PADDING
    objects: bool = False
    _parts: list[Any] = field(factory=list, init=False)
    _missing: int = field(default=0, init=False)
    _on_host: int = field(default=0, init=False)

    def add(self, value: Any) -> None:
        """Append a batch's outputs, or note that it has none."""
        if value is None:
            self._missing += 1
            return
        self._parts.append(compact(detached(value)))
        if self.every and len(self._parts) - self._on_host >= self.every:
            self._to_host()

    def result(self) -> Any:
        """Return NumPy arrays in the structure of a batch's outputs; None if no batch had any.

        Raises:
            ValueError: if some batches had outputs and others none, or their shapes do not fit.
            TypeError: if their structures differ, or there is something that is no array.
        """
        self._to_host()
        if not self._parts:
            return None
        if self._missing:
            raise ValueError(
                f"{self._missing} of {self._missing + len(self._parts)} batches have no {self.what}, "
                "so rows would not belong together. All batches, or none, must have them."
            )
        if not self.concatenate:
            return self._parts
        return join(self._parts, self.what, self.padding, objects=self.objects)

    def _to_host(self) -> None:
        for i in range(self._on_host, len(self._parts)):
            self._parts[i] = to_numpy(self._parts[i])
        self._on_host = len(self._parts)


def join(
    parts: list[Any], what: str = "outputs", padding: int = PADDING, *, objects: bool = False
) -> Any:
    """Concatenate nested arrays along the first axis, padding the second to the widest.

    Args:
        parts: the outputs of each batch, at least one.
        what: their name, for messages.
        padding: fills what a narrower batch lacks, on the right.
        objects: lists hold one object per sample and are appended to each other; anything else that
            is no array becomes a list with one entry per batch. Without, a list is a structure like a
            tuple, and anything else is refused.

    Raises:
        TypeError: if the batches have different structures or leaves that are no arrays.
        ValueError: if arrays differ in more than the first two axes.
    """
    return _Joiner(what, padding, objects).join(parts)


@frozen
class _Joiner:
    where: str
    padding: int
    objects: bool

    def join(self, parts: list[Any]) -> Any:
        first = parts[0]
        appended = self.objects and isinstance(first, list)
        for number, part in enumerate(parts):
            if not (type(part) is type(first) and (appended or _keys(part) == _keys(first))):
                raise TypeError(
                    f"{self.where}: batch {number} has {_form(part)} where batch 0 has "
                    f"{_form(first)}, so they cannot be joined. Return the same structure for every "
                    f"batch, {_APART}."
                )
        if appended:
            return [sample for part in parts for sample in part]
        if isinstance(first, Mapping):
            return {key: self._inside(key, parts) for key in first}
        if isinstance(first, list | tuple):
            joined = [self._inside(index, parts) for index in range(len(first))]
            return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
        if isinstance(first, np.ndarray):
            return self._arrays([np.atleast_1d(part) for part in parts])
        if isinstance(first, Tensor):
            return self._tensors([torch.atleast_1d(part.to(first.device)) for part in parts])
        if self.objects:
            return parts
        raise TypeError(
            f"{self.where}: cannot join values of type {type(first).__name__}; expected tensors. Set "
            f"eval_use_gather_object=True for lists of Python objects, {_APART}."
        )

    def _inside(self, key: Any, parts: list[Any]) -> Any:
        inner = evolve(self, where=f"{self.where}[{key!r}]")
        return inner.join([part[key] for part in parts])

    def _arrays(self, arrays: list[Any]) -> Any:
        self._check_shapes(arrays)
        widths = {array.shape[1] for array in arrays if array.ndim > 1}
        if len(widths) <= 1:
            return np.concatenate(arrays, axis=0)
        shape = (sum(map(len, arrays)), max(widths), *arrays[0].shape[2:])
        return self._padded(arrays, np.full(shape, self.padding, dtype=np.result_type(*arrays)))

    def _tensors(self, tensors: list[Tensor]) -> Tensor:
        self._check_shapes(tensors)
        widths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
        if len(widths) <= 1:
            return torch.cat(tensors)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        shape = (sum(map(len, tensors)), max(widths), *tensors[0].shape[2:])
        joined: Tensor = self._padded(
            tensors, tensors[0].new_full(shape, self.padding, dtype=dtype)
        )
        return joined

    def _padded(self, parts: list[Any], joined: Any) -> Any:
        row = 0
        for part in parts:
            joined[row : row + len(part), : part.shape[1]] = part
            row += len(part)
        return joined

    def _check_shapes(self, arrays: list[Any]) -> None:
        first = arrays[0]
        for number, array in enumerate(arrays):
            if (array.ndim, array.shape[2:]) != (first.ndim, first.shape[2:]):
                raise ValueError(
                    f"{self.where}: batch {number} has the shape {tuple(array.shape)} and batch 0 "
                    f"{tuple(first.shape)}; only the first two axes may differ. Reduce the outputs with "
                    f"preprocess_logits_for_metrics, {_APART}."
                )


def _keys(part: Any) -> Any:
    if isinstance(part, Mapping):
        return set(part)
    return len(part) if isinstance(part, list | tuple) else None


def _form(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"a {type(part).__name__} of {', '.join(map(str, part))}"
    if isinstance(part, list | tuple):
        return f"a {type(part).__name__} of {len(part)}"
    return f"a value of type {type(part).__name__}"
