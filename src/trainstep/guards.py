"""What a step does about losses and gradients that are not finite, without asking the host."""

from typing import Any

import torch
from torch import Tensor

from trainstep import tree
from trainstep.losses import Loss
from trainstep.state import TrainState


def require_finite(step: int, loss: Loss, norm: Tensor) -> None:
    """Raise FloatingPointError unless loss and gradient norm are finite. Reads both: a host sync."""
    if not bool(finite(loss, norm)):
        raise FloatingPointError(
            f"step {step}: loss is {loss.value.item()}, gradient norm is {norm.item()}. Nothing was "
            'updated; the state is as before. Lower the learning rate, clip, or use on_nonfinite="skip".'
        )


def finite(loss: Loss, norm: Tensor) -> Tensor:
    """Return a boolean scalar on the device: are the loss and the gradient norm finite?"""
    return torch.isfinite(norm) & torch.isfinite(loss.value).to(norm.device)


def skip_unless(ok: Tensor, new: TrainState, old: TrainState, *, in_place: bool) -> TrainState:
    """Return ``new`` where ``ok``, else ``old`` with the step counted and one more skip.

    Args:
        ok: boolean scalar on the device.
        new: the state after the update.
        old: the state before it, same structure.
        in_place: write the outcome into the tensors of ``old``, as a donated step must.

    The count is ``extras["skipped"]``, an int64 scalar.
    """

    def choose(after: Any, before: Any) -> Any:
        if isinstance(after, Tensor):
            picked = torch.where(ok.to(after.device), after, before)
            return before.copy_(picked) if in_place else picked
        # A number that a foreign optimizer keeps: only the host can choose, so only then it must.
        return after if after == before or bool(ok) else before

    skipped = old.extras.get("skipped", torch.zeros((), dtype=torch.int64, device=ok.device))
    kept = {name: value for name, value in old.extras.items() if name in new.extras}
    with torch.no_grad():
        chosen = {
            "params": tree.map(choose, new.params, old.params),
            "buffers": tree.map(choose, new.buffers, old.buffers),
            "opt_state": tree.map(choose, new.opt_state, old.opt_state),
            "extras": tree.map(choose, {n: new.extras[n] for n in kept}, kept),
        }
        chosen["extras"]["skipped"] = skipped + (~ok).to(torch.int64)
    return new.evolve(**chosen)
