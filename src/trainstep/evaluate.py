"""``make_eval_step``: the loss of a batch in evaluation mode, as a function of the state."""

import inspect
from typing import Any

import torch
from attrs import field, frozen

from trainstep.losses import check_aux
from trainstep.rng import Key
from trainstep.state import TrainState
from trainstep.types import LossFn, Metrics

# A branch of the state's key that no training step uses.
_BRANCH = 2


@frozen(eq=False)
class EvalStep:
    """``evaluate(state, batch) -> metrics``; what ``make_eval_step`` returns.

    Attributes:
        loss_fn: the loss, called with ``train=False`` if it takes that.
    """

    loss_fn: LossFn
    _options: dict[str, Any] = field(init=False, repr=False)

    @_options.default
    def _evaluation_mode(self) -> dict[str, Any]:
        return {"train": False} if "train" in inspect.signature(self.loss_fn).parameters else {}

    def __call__(self, state: TrainState, batch: Any) -> Metrics:
        """Return the metrics of one batch; they stay on the device."""
        return self.metrics(state, batch, self.loss_key(state))

    def loss_key(self, state: TrainState) -> Key:
        """Return the key that the loss draws from, the same for every batch."""
        return state.key.fold_in(_BRANCH)

    def metrics(self, state: TrainState, batch: Any, key: Any) -> Metrics:
        """Return the metrics of one batch, drawn from ``key``."""
        with torch.no_grad():
            loss = self.loss_fn(state.params, state.buffers, batch, key, **self._options)
        check_aux("make_eval_step", loss.aux, ("loss", "weight"))
        metrics = {"loss": loss.value, "weight": torch.as_tensor(loss.weight)}
        return metrics | {name: extra / loss.weight for name, extra in loss.aux.items()}


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """Make ``evaluate(state, batch) -> metrics``: the loss in evaluation mode, without gradients.

    A loss function that takes ``train`` (as those of ``module_loss`` do) is called with False.
    Metrics are ``loss``, ``weight`` and the loss's ``aux`` divided by the weight. It raises ValueError for
    ``aux`` with one of these names.
    """
    return EvalStep(loss_fn)
