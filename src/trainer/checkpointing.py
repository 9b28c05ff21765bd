"""Gradient checkpointing: activations recomputed in the backward pass, in models that offer it."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from trainer import modeling

_enabled: "WeakKeyDictionary[nn.Module, dict[str, Any]]" = WeakKeyDictionary()


def enable(model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> None:
    """Switch on a model's gradient checkpointing.

    The variant that is not reentrant is the default, as PyTorch recommends. The reentrant one gives the
    same gradients where they come from ``loss.backward()``; the pure step's ``torch.autograd.grad``
    refuses it.

    Args:
        model: has ``gradient_checkpointing_enable``; PyTorch's wrappers are looked through.
        kwargs: options of ``torch.utils.checkpoint.checkpoint``. Enabling a model again with the same
            options does nothing, since library models would add another hook each time.

    Raises:
        ValueError: if the model does not offer it.
    """
    model = modeling.unwrap(model)
    options = {"use_reentrant": False, **(kwargs or {})}
    start = getattr(model, "gradient_checkpointing_enable", None)
    if not callable(start):
        raise ValueError(
            f"gradient_checkpointing=True: {type(model).__name__} has no method "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs=...). Call "
            "torch.utils.checkpoint.checkpoint in its forward, and leave gradient_checkpointing=False."
        )
    if _enabled.get(model) == options and getattr(model, "is_gradient_checkpointing", False):
        return
    start(gradient_checkpointing_kwargs=options)
    _enabled[model] = options
