"""What of a rank's ``Sums`` travels to other ranks, and how their sum becomes ``Sums`` again."""

from typing import Any

import torch
from attrs import evolve

from trainstep.sums import Sums

_HIGH = 4096.0


def parts(sums: Sums, *, paired: bool = False) -> dict[str, Any]:
    """Return what of ``sums`` can be added to those of other ranks, in units of 1.

    Args:
        sums: those of this rank.
        paired: let a weight that is a number travel as two of the total's type, and so with it and the
            gradients, rather than as a float64 number in a buffer of its own. Of whole weights, float32
            holds the sum exactly up to 2**36; others are rounded to it.
    """
    grads, total, weight = sums.grads, sums.total, sums.weight
    if sums.unit != 1:
        grads = {name: grad * sums.unit for name, grad in grads.items()}
        total, weight = total * sums.unit, weight * sums.unit
    if not isinstance(weight, torch.Tensor):
        weight = float(weight)  # not an integer on one rank and a float on another
        if paired and total.dtype in (torch.float32, torch.float64):
            # Made on the device: a recording could not hold a copy of the host's memory.
            weight = torch.stack([total.new_full((), part) for part in divmod(weight, _HIGH)])
    return {"grads": grads, "total": total, "weight": weight, "aux": sums.aux}


def joined(sums: Sums, added: dict[str, Any]) -> Sums:
    """Return ``sums`` with what the ``parts`` of all ranks add up to."""
    weight = added["weight"]
    if not isinstance(sums.weight, torch.Tensor):
        if weight.ndim:
            high, low = weight
            weight = high * _HIGH + low
        # Of the default type, so that it divides as a number does: a total in float32 stays float32.
        weight = weight.to(torch.get_default_dtype())
    return evolve(sums, **{**added, "weight": weight}, unit=1.0)
