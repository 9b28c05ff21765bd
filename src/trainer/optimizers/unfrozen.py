"""Parameters that a callback unfreezes while others train: a training has those that it began with."""

import logging
from collections.abc import Container
from typing import Any

from trainer import modeling

logger = logging.getLogger(__name__)


class Unfrozen:
    """Warns, once for each, of parameters that are trainable by now and are not trained.

    Args:
        model: the module.
        trained: names of the parameters that are trained.
    """

    def __init__(self, model: Any, trained: Container[str]) -> None:
        self._model, self._trained = modeling.unwrap(model), trained
        self._told: set[str] = set()

    def look(self) -> None:
        """Look at all parameters: at logs and epochs, since at every step it would cost too much."""
        named = self._model.named_parameters()
        found = [name for name, p in named if p.requires_grad and name not in self._trained]
        new = [name for name in found if name not in self._told]
        if new:
            self._told.update(new)
            logger.warning(
                "Frozen when training began, trainable now, and not trained by this training: %s. Begin "
                "with them unfrozen and freeze them in on_train_begin, or call train() again.",
                ", ".join(new),
            )
