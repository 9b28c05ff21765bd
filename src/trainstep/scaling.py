"""Dynamic loss scaling for float16, as part of the state.

Gradients of float16 computations underflow. The loss is multiplied by a large number before the
backward pass and the gradients are divided by it afterwards; the number is lowered when gradients
overflow and raised when they have not for a while (Micikevicius et al., 2018).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.guards import Verdict
from trainstep.losses import Loss
from trainstep.types import Params


@frozen
class DynamicScale:
    """How the loss scale moves; the scale itself is in the state. Used as ``make_step(loss_scale=...)``.

    The scales are those of ``torch.amp.GradScaler`` with the same arguments. A step whose gradients
    overflow is skipped without a host sync: parameters, buffers, moments and the state of transforms
    stay, and ``extras["skipped"]`` counts it. Loss, gradient norm and gradients that the step reports
    and hands to transforms are those without the scale.

    Attributes:
        init_scale: the scale at the start.
        growth_factor: what it is multiplied by after ``growth_interval`` steps without overflow.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: steps in a row without overflow before it grows.

    Its state is ``extras["loss_scale"]``: ``scale``, float32, and ``growth``, the steps without overflow
    since the last change, int32; both zero-dimensional.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    name: str = field(default="loss_scale", init=False, repr=False)
    skips: bool = field(default=True, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for what, value, fits, bound in (
            ("init_scale", self.init_scale, 0 < self.init_scale < math.inf, "above 0 and finite"),
            ("growth_factor", self.growth_factor, self.growth_factor > 1, "above 1"),
            ("backoff_factor", self.backoff_factor, 0 < self.backoff_factor < 1, "in (0, 1)"),
            ("growth_interval", self.growth_interval, self.growth_interval >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"DynamicScale: {what} must be {bound}, got {value}")

    def init(self, params: Params) -> dict[str, Tensor]:
        """Return ``scale`` and ``growth`` before the first step, on the device of the parameters."""
        device = next(iter(params.values())).device
        return {
            "scale": torch.full((), self.init_scale, dtype=torch.float32, device=device),
            "growth": torch.zeros((), dtype=torch.int32, device=device),
        }

    def judge(self, memory: Any, loss: Loss, norm: Tensor) -> Verdict:
        """Refuse the update if the gradients overflowed, and move the scale."""
        ok = torch.isfinite(norm).to(memory["scale"].device)
        scale, growth = memory["scale"].clone(), memory["growth"].clone()
        # GradScaler's own kernel: no host sync, and it stops growing before infinity.
        torch._amp_update_scale_(
            scale,
            growth,
            (~ok).to(torch.float32),
            self.growth_factor,
            self.backoff_factor,
            self.growth_interval,
        )
        return Verdict({"scale": scale, "growth": growth}, ok)


def unscale_(grads: Iterable[Tensor], scale: Tensor) -> None:
    """Divide gradients by the loss scale that the loss was multiplied by, in place."""
    # By way of float64 where there is one, as torch.amp.GradScaler does.
    wide = scale if scale.device.type == "mps" else scale.double()
    inverse = wide.reciprocal().float()
    with torch.no_grad():
        for group in tree.by_device_and_dtype(list(grads)):
            torch._foreach_mul_(group, inverse.to(group[0].device))
