"""Gradients from CUDA graphs: ``training_step`` recorded, for every shape of batch, and replayed."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from trainer.engine import LocalEngine
from trainstep.captured import CapturedStep
from trainstep.stages import Inputs
from trainstep.types import Buffers, Grads

logger = logging.getLogger(__name__)


class CapturedEngine:
    """Runs the micro-batches of an update as one CUDA graph; goes on without graphs where that fails.

    Args:
        local: the engine whose work is recorded.
        step: the captured step, with whose graphs memory is shared.
        device: the CUDA device of all parameters.
        give_up: called once if the step turns out not to be recordable.
    """

    def __init__(
        self,
        local: LocalEngine,
        step: CapturedStep,
        device: torch.device,
        give_up: Callable[[], Any],
    ) -> None:
        self._local = local
        self._device = device
        self._give_up = give_up
        self._graphs: Inputs | None = Inputs(device, step.pool, step.limit)
        self._grads: Grads = {}
        self._losses: list[Tensor] = []

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run an update's micro-batches at once; yields their joint loss after each."""
        if self._graphs is not None:
            batches = [self._placed(batch) for batch in batches]
            self._local.prepare()
            self._grads = {}  # else those of an update without graph would live on through the next
            try:
                total, shares, self._grads = self._graphs(
                    lambda inputs, key: self._run(inputs, window, key), (batches, items), key
                )
            except ts.CaptureError as error:
                logger.warning("capture is off, training goes on without it: %s", error)
                self._graphs, self._grads = None, {}
                self._give_up()
            else:
                self._local.show(self._grads)
                # Cloned, since the next replay overwrites them.
                self._losses = [] if shares is None else list(shares.clone().unbind())
                for _ in range(window):
                    yield total
                return
        yield from self._local.passes(batches, items, window, key)

    def losses(self) -> list[Tensor]:
        """Return what each of several micro-batches added to the loss."""
        return self._losses if self._graphs is not None else self._local.losses()

    def collect(self) -> Grads:
        """Return the gradients of the last update; the next one overwrites them."""
        return self._grads if self._graphs is not None else self._local.collect()

    def drop(self) -> None:
        """Forget gradients that no graph holds."""
        if self._graphs is None:
            self._local.drop()

    def buffers(self) -> Buffers:
        """Return the module's buffers."""
        return self._local.buffers()

    def _placed(self, batch: Any) -> Any:
        return batch if type(batch) is dict else ts.tree.plain(batch)

    def _run(
        self, inputs: tuple[Any, Any], window: int, key: Any
    ) -> tuple[Tensor | None, Tensor | None, Grads]:
        batches, items = inputs
        recording = torch.cuda.is_current_stream_capturing()
        before = {} if recording else ts.tree.clone(self._local.buffers())
        try:
            self._local.drop()
            *_, total = self._local.passes(batches, items, window, key)
            self._local.keep_buffers()
            shares = torch.stack(self._local.losses()) if window > 1 else None
            return total, shares, self._local.collect()
        except BaseException:
            self._local.drop()
            for name, tensor in self._local.buffers().items():
                if name in before:
                    tensor.copy_(before[name])
            raise
