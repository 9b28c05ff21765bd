"""Clipping as ``args.max_grad_norm`` says at the moment: callbacks may change it while a run goes on."""

from typing import Any

from attrs import evolve

import trainstep as ts
from trainer.optimization import make_transforms


class Clipping:
    """Keeps the transforms of a run's step up to date; called before every update.

    Args:
        trainer: whose arguments are looked at.
        run: whose step was made with ``make_transforms`` of them.
    """

    def __init__(self, trainer: Any, run: Any) -> None:
        self._trainer, self._run = trainer, run
        self._norm = trainer.args.max_grad_norm

    def __call__(self) -> None:
        """Put other transforms into the step if the norm has changed since the last update."""
        if self._trainer.args.max_grad_norm != self._norm:
            self._change(self._trainer.args.max_grad_norm)

    def _change(self, norm: float | None) -> None:
        run = self._run
        if not isinstance(run.step, ts.Step):  # a recording clips at what it was made with
            run.engine.give_up(f"args.max_grad_norm was changed to {norm} during training")
        run.step = evolve(run.step, transforms=make_transforms(self._trainer.args))
        self._norm = norm
