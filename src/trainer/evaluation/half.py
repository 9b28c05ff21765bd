"""Evaluation in half precision throughout (``bf16_full_eval``, ``fp16_full_eval``)."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainer import modeling


@contextmanager
def half_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let a model compute with copies of its weights in ``dtype``; None changes nothing.

    On leaving, also after an exception, parameters and buffers have their own memory again: the same
    bits in the same place, which the train state shares. Until then the copies take memory of their own.
    Only what is floating-point is exchanged, so counters go on counting.
    """
    if dtype is None:
        yield
        return
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    own = [tensor.data for tensor in tensors]
    try:
        # The contents and not the entries of the modules' dicts are exchanged: recurrent modules look
        # their weights up in lists of their own.
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


def cast_inputs(inputs: Any, dtype: torch.dtype, labels: Collection[str]) -> Any:
    """Return a batch whose floating-point tensors, other than labels, are of ``dtype``.

    Weights of a half type take no other inputs. Mappings, lists and tuples keep their type; ``labels``
    are names at any depth.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return modeling.with_tensors(inputs, cast, labels)
