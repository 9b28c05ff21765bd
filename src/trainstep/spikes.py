"""``spike_guard``: no update, or a smaller one, where the loss jumps."""

from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from trainstep.guards import Verdict
from trainstep.losses import Loss
from trainstep.types import Params


@frozen
class SpikeGuard:
    """A guard against jumps of the loss; see ``spike_guard``."""

    window: int
    sigma: float
    action: Literal["skip", "clip"]
    name: str

    @property
    def skips(self) -> bool:
        """Whether updates can be refused."""
        return self.action == "skip"

    def init(self, params: Params) -> dict[str, Tensor]:
        """Return an empty window, on the device of the parameters."""
        device = next(iter(params.values())).device
        return {
            "losses": torch.zeros(self.window, dtype=torch.float32, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def judge(self, memory: Any, loss: Loss, norm: Tensor) -> Verdict:
        """Compare the loss with the window before it, and put it there."""
        losses, count = memory["losses"], memory["count"]
        value = loss.value.detach().to(losses)
        deviation, mean = torch.std_mean(losses, correction=0)
        room = self.sigma * deviation
        # Written so that a loss that is NaN does not count as calm.
        calm = (count < self.window) | (value <= mean + room)
        counted = torch.isfinite(value)
        here = torch.arange(self.window, device=losses.device) == count % self.window
        after = {
            "losses": torch.where(here & counted, value, losses),
            "count": count + counted.to(count.dtype),
        }
        if self.action == "skip":
            return Verdict(after, ok=calm)
        return Verdict(after, factor=torch.where(calm | ~counted, 1.0, room / (value - mean)))


def spike_guard(
    window: int = 100,
    sigma: float = 4.0,
    *,
    action: Literal["skip", "clip"] = "skip",
    name: str = "spike",
) -> SpikeGuard:
    """Guard against steps whose loss is above ``mean + sigma * std`` of the last ``window`` losses.

    Pass it as ``make_step(guards=(spike_guard(...),))``. There is no host sync: the statistics are in
    the state and the choice is made on the device. Nothing is judged until the window is full.

    Every finite loss enters the window, refused ones too, so a lasting change of level is accepted
    after at most ``window / (1 + sigma**2) + 1`` steps, at the price of a wider band until a spike has
    left the window.

    Args:
        window: how many losses the statistics are taken over.
        sigma: how many standard deviations (of the population) above the mean is a spike.
        action: ``"skip"`` refuses the update, as ``on_nonfinite="skip"`` does, also where the loss is
            not finite; ``"clip"`` multiplies the gradients by ``sigma * std / (loss - mean)``, which is
            below 1, before the transforms.
        name: where the window is kept in ``extras``; several guards in one step need different names.

    Raises:
        ValueError: for a window below 2, ``sigma`` not above 0, or an unknown action.
    """
    if window < 2:
        raise ValueError(f"spike_guard: window must be at least 2, got {window}")
    if not sigma > 0:
        raise ValueError(f"spike_guard: sigma must be above 0, got {sigma}")
    if action not in ("skip", "clip"):
        raise ValueError(f'spike_guard: action must be "skip" or "clip", got {action!r}')
    return SpikeGuard(window, sigma, action, name)
