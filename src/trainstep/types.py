"""Names for the values that flow through a training step.

Everything here is an alias or a protocol: the core asks for shapes of data, never for base classes.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from trainstep.losses import Loss
    from trainstep.rng import Key

Params = dict[str, Tensor]
"""Trainable tensors by dotted name."""
Buffers = dict[str, Tensor]
"""Tensors that no gradient reaches, by dotted name: module buffers and frozen parameters."""
Grads = dict[str, Tensor]
"""Gradients by parameter name. A parameter that the loss did not reach has no entry."""
OptState = Any
"""A pytree of tensors that an optimizer keeps between steps."""
Metrics = dict[str, Tensor]
"""Zero-dimensional, detached tensors; they stay on the device until somebody reads them."""
Hyper = Mapping[str, Any]
"""Hyperparameters of one update, such as ``{"lr": 3e-4}``; floats or zero-dimensional tensors."""
Schedule = Callable[[int], float]
"""Maps a zero-based step to a learning rate."""
HyperSchedule = Callable[[int], Hyper]
"""Maps a zero-based step to several hyperparameters by name."""


class LossFn(Protocol):
    """A pure loss: reads its arguments, writes its result."""

    def __call__(self, params: Params, buffers: Buffers, batch: Any, key: "Key") -> "Loss":
        """Return the loss of ``batch`` as a sum and a weight, with the buffers that follow."""
        ...
