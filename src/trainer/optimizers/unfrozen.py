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
        named = modeling.unwrap(model).named_parameters()
        self._frozen = {name: p for name, p in named if name not in trained}

    def look(self) -> None:
        """Look at the parameters that are not trained; done at logs and epochs."""
        new = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        for name in new:
            del self._frozen[name]
        if new:
            logger.warning(
                "Frozen when training began, trainable now, and not trained by this training: %s. Begin "
                "with them unfrozen and freeze them in on_train_begin, or call train() again.",
                ", ".join(new),
            )
