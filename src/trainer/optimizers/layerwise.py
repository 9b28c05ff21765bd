"""``LayerwiseOptimizer``: one optimizer per parameter, stepped as soon as its gradient is complete."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Updates parameters one by one, so that gradients never exist all at once.

    It looks like one optimizer over all groups: rates set in ``param_groups`` are those that the parts
    use, and ``state`` is the moments of all. Who trains calls ``update`` for each parameter during the
    backward pass; ``step`` then has nothing left to do.

    Args:
        params: parameter groups, as optimizers take them.
        optimizer_cls: the class of the parts.
        options: its keyword arguments.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], optimizer_cls: Callable[..., Any], **options: Any
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in params]
        self._parts: dict[Tensor, torch.optim.Optimizer] = {
            parameter: optimizer_cls([{**group, "params": [parameter]}], **options)
            for group in groups
            for parameter in group["params"]
        }
        super().__init__(groups, next(iter(self._parts.values())).defaults)
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        for part in self._parts.values():
            self.state.update(part.state)

    def update(self, parameter: Tensor) -> None:
        """Update one parameter by its ``.grad``."""
        part = self._parts[parameter]
        part.state = self.state  # which may have been replaced by loading
        options = {k: v for k, v in self._group_of[parameter].items() if k != "params"}
        part.param_groups[0].update(options)
        part.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has made the update."""
