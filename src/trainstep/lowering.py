"""Other ways to run the same step: same arguments, same bits, other costs."""

from typing import Any, overload

from attrs import evolve

from trainstep.step import Step
from trainstep.vmap import Ensemble


@overload
def donate(step: Step) -> Step: ...
@overload
def donate(step: Ensemble) -> Ensemble: ...
def donate(step: Step | Ensemble) -> Step | Ensemble:
    """Return the step that reuses the buffers of the state it is given.

    As ``jax.jit(donate_argnums=0)``: parameters and moments are updated in place, which saves a copy
    of both in memory and time. The old state is consumed: using it raises RuntimeError. The result has
    the same bits as without.

    States that share tensors with the consumed one (made by ``evolve``, say) see the new values.

    Raises:
        TypeError: if ``step`` was made by neither ``make_step`` nor ``vmap.ensemble``.
    """
    if isinstance(step, Ensemble):
        return step.donated()
    if not isinstance(step, Step):
        raise TypeError(f"donate: expected what make_step returned, got {_kind(step)}")
    return evolve(step, donates=True)


def _kind(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
