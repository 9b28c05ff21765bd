"""From a class and its options to an optimizer over a model's parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.optimizers.bnb import keep_embeddings_wide

# What a builder may put into the options to stand in the place of the usual parameter groups.
_IN_PLACE_OF_GROUPS = ("params", "model", "optimizer_dict")


def build_optimizer(
    cls: Any, kwargs: dict[str, Any], model: nn.Module, groups: Callable[[], list[dict[str, Any]]]
) -> Any:
    """Build an optimizer.

    Args:
        cls: a subclass of ``torch.optim.Optimizer``, called with groups and options; anything else is a
            factory, called without arguments, and what it returns with the model and the options.
        kwargs: options. ``params``, ``model`` or ``optimizer_dict`` among them replaces the groups.
        model: whose parameters are trained.
        groups: makes the usual parameter groups.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        return cls()(model, **kwargs)
    options = dict(kwargs)
    given = [options.pop(key) for key in _IN_PLACE_OF_GROUPS if key in options]
    keep_embeddings_wide(cls, options, model)
    return cls(given[-1] if given else groups(), **options)
