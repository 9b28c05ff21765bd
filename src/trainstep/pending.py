"""An update whose gradients are final and which has not been made yet."""

from typing import Any

from attrs import evolve, frozen
from torch import Tensor

from trainstep.losses import Loss
from trainstep.types import Grads, Hyper


@frozen(eq=False)
class Pending:
    """What ``Step.prepare`` returns and ``Step.finish`` takes.

    Attributes:
        loss: the loss that the gradients belong to.
        grads: gradients that guards have judged and transforms have changed.
        hyper: the hyperparameters of the update.
        norm: global norm of the gradients before the transforms, a scalar.
        ok: whether the update happens, a bool tensor; None if it always does.
        seen: what guards will remember.
        before: ``state.extras``, complete.
        after: the same after the transforms.
    """

    loss: Loss
    grads: Grads
    hyper: Hyper
    norm: Tensor
    ok: Tensor | None
    seen: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]

    def with_grads(self, grads: Grads, hyper: Hyper | None = None) -> "Pending":
        """Return it with other gradients for the optimizer, and with other hyperparameters if given."""
        return evolve(self, grads=grads, hyper=self.hyper if hyper is None else hyper)
