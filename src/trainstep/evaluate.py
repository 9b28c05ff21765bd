"""``make_eval_step``: the loss of a batch in evaluation mode, as a function of the state."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from trainstep.losses import check_aux
from trainstep.state import TrainState
from trainstep.types import LossFn, Metrics

# A branch of the state's key that no training step uses.
_BRANCH = 2


def make_eval_step(loss_fn: LossFn) -> Callable[[TrainState, Any], Metrics]:
    """Make ``evaluate(state, batch) -> metrics``: the loss in evaluation mode, without gradients.

    A loss function that takes ``train`` (as those of ``module_loss`` do) is called with False.
    Metrics are ``loss``, ``weight`` and the loss's ``aux`` divided by the weight. It raises ValueError for
    ``aux`` with one of these names.
    """
    takes_train = "train" in inspect.signature(loss_fn).parameters
    options: dict[str, Any] = {"train": False} if takes_train else {}

    def evaluate(state: TrainState, batch: Any) -> Metrics:
        with torch.no_grad():
            loss = loss_fn(
                state.params, state.buffers, batch, state.key.fold_in(_BRANCH), **options
            )
        check_aux("make_eval_step", loss.aux, ("loss", "weight"))
        metrics = {"loss": loss.value, "weight": torch.as_tensor(loss.weight)}
        return metrics | {name: extra / loss.weight for name, extra in loss.aux.items()}

    return evaluate
