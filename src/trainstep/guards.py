"""What a step does about losses and gradients that are wrong, without asking the host.

A guard looks at the loss and the gradient norm of a step, remembers what it needs in the state
(``extras[name]``), and says whether the update may happen. ``make_step(on_nonfinite="skip")``,
``trainstep.DynamicScale`` and ``trainstep.spike_guard`` are guards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainstep import tree
from trainstep.losses import Loss
from trainstep.state import TrainState
from trainstep.types import Grads, Params


class Verdict(NamedTuple):
    """What a guard says about a step.

    Attributes:
        memory: what the guard remembers from now on, whether or not the update happens.
        ok: boolean scalar on the device: may the update happen? None: always.
        factor: scalar on the device that gradients are multiplied by; None: 1.
    """

    memory: Any
    ok: Tensor | None = None
    factor: Tensor | None = None


class Guard(Protocol):
    """The contract of a guard. All three are pure."""

    @property
    def name(self) -> str:
        """Where its memory is kept: ``extras[name]``."""

    @property
    def skips(self) -> bool:
        """Whether its verdicts have ``ok``."""

    def init(self, params: Params) -> Any:
        """Return the memory before the first step: a pytree of tensors."""

    def judge(self, memory: Any, loss: Loss, norm: Tensor) -> Verdict:
        """Judge a step by its loss and its gradient norm, both before the transforms."""


def judge(
    guards: Sequence[Guard],
    extras: dict[str, Any],
    loss: Loss,
    norm: Tensor,
    ok: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    """Ask every guard; ``ok`` is what is known before.

    Returns:
        ``(ok, factor, memory)``: whether all agree; the product of their factors; what they remember,
        by name. None where no guard has an opinion.
    """
    memory: dict[str, Any] = {}
    factor: Tensor | None = None
    for guard in guards:
        verdict = guard.judge(extras[guard.name], loss, norm)
        memory[guard.name] = verdict.memory
        if verdict.ok is not None:
            ok = verdict.ok if ok is None else ok & verdict.ok.to(ok.device)
        if verdict.factor is not None:
            factor = verdict.factor if factor is None else factor * verdict.factor
    return ok, factor, memory


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


def scale_(grads: Grads, factor: Tensor) -> Grads:
    """Multiply gradients by a factor in place; a factor of 1 leaves their bits."""
    with torch.no_grad():
        for group in tree.by_device_and_dtype(list(grads.values())):
            torch._foreach_mul_(group, factor.to(group[0].device))
    return dict(grads)


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
        if after is before:
            return after
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
