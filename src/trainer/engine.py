"""How gradients come about in a single process."""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

import trainstep as ts
from trainer import modeling
from trainer.data.columns import names_in
from trainstep import TrainState
from trainstep.types import Buffers, Grads

logger = logging.getLogger(__name__)


class LocalEngine:
    """Gradients through the live module, whose parameters share storage with the train state.

    The module's own parameters are the leaves of the graph: hooks, overridden ``training_step`` methods
    and callbacks that look at ``.grad`` find what they expect, and nothing is exchanged or copied.
    """

    def __init__(self, trainer: Any, state: TrainState) -> None:
        self._trainer = trainer
        # Subclasses may define training_step(self, model, inputs), as older scripts do.
        self._takes_items = _takes(trainer.training_step, 3)
        self._module = modeling.unwrap(trainer.model)
        parameters = dict(self._module.named_parameters())
        self._parameters = [(name, parameters[name]) for name in state.params]
        self._buffer_names = frozenset(state.buffers)
        self._devices = {p.device for p in state.params.values()}
        self._kept = {
            (module, name): buffer
            for module in self._module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._losses: list[Tensor] = []
        self._warned = False
        self.drop()  # what an interrupted training, or the caller, may have left

    def backward(self, batch: Any, items: Any, window: int) -> Tensor:
        """Run ``training_step`` on one micro-batch."""
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = window
        if trainer.optimizer is not None:  # torch's schedulers let its step() set this
            trainer.optimizer._opt_called = False
        try:
            if self._takes_items:
                return trainer.training_step(trainer.model_wrapped, batch, items)
            return trainer.training_step(trainer.model_wrapped, batch)
        except Exception as error:
            error.add_note(
                f"while training on the batch {describe(batch)} at step {trainer.state.global_step}"
                f"{self._columns() if isinstance(error, TypeError) else ''}"
            )
            raise

    def _columns(self) -> str:
        """Say what the model takes and the data has; a missing argument is a column by another name."""
        taken = ", ".join(modeling.forward_names(self._module))
        found = names_in(self._trainer.train_dataset)
        data = f", the training data have {', '.join(found)}" if found else ""
        return f"; the model's forward takes {taken}{data}"

    def passes(
        self, batches: Iterable[Any], items: Any, window: int, key: Any
    ) -> Iterator[Tensor | None]:
        """Run the micro-batches of an update one by one; yields the sum of their losses so far."""
        total: Any = None
        self._losses = []
        for number, batch in enumerate(batches):
            with ts.rng.seeded(key.fold_in(number), self._devices):
                share = self.backward(batch, items, window)
            if window > 1:
                self._losses.append(share.detach())
            total = share if total is None else total + share
            yield total

    def losses(self) -> list[Tensor]:
        """Return what each of several micro-batches added to the loss; nothing for a single one."""
        return self._losses

    def collect(self) -> Grads:
        """Return the gradients that the parameters hold. Those that were not reached have none.

        Of gradients that were used up in the backward pass, the norms are left, once. There are none at
        all where an overridden ``training_step`` leaves out a bad batch: such an update changes nothing.

        Raises:
            ValueError: if there are none in the first update, or ``training_step`` has used them itself.
        """
        adopted = self._trainer._adopted
        if adopted is not None and adopted.fused is not None:
            grads = adopted.fused.collect()
        else:
            grads = {n: p.grad for n, p in self._parameters if p.grad is not None}
        if not grads:
            self._check_left_out()
        return grads

    def _check_left_out(self) -> None:
        """Tell an update that is left out on purpose from a mistake, and warn of the first."""
        if getattr(self._trainer.optimizer, "_opt_called", False):
            raise ValueError(
                "no parameter has a gradient after training_step, which called optimizer.step() and "
                "zero_grad() itself. The Trainer does that, with the gradients that training_step leaves: "
                "let it call backward only, or write a loop of your own."
            )
        if self._trainer.state.global_step == 0:
            raise ValueError(
                "no parameter received a gradient. training_step must call backward on a loss that "
                "depends on the model's output, outside torch.no_grad(), and leave optimizer.step() and "
                "zero_grad() to the Trainer. It may leave out batches, but not the first."
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "No parameter received a gradient at step %d: training_step left out the batch. The step "
                "counts, and changes no parameter. This is said once.",
                self._trainer.state.global_step,
            )

    def drop(self) -> None:
        """Take the gradients off the parameters."""
        for _, parameter in self._parameters:
            parameter.grad = None

    def show(self, grads: Grads) -> None:
        """Put gradients where callbacks look for them."""
        name, parameter = self._parameters[-1]
        if parameter.grad is grads.get(name):  # they are there since the last time
            return
        for name, parameter in self._parameters:
            parameter.grad = grads.get(name)

    def prepare(self) -> None:
        """Do what ``training_step`` does on the host for a recording of it: see to the modes."""
        model = self._trainer.model_wrapped
        if not model.training:
            model.train()
        self._trainer._switch_optimizer("train")

    def keep_buffers(self, values: bool = True) -> None:
        """Put back the state's buffers where the module has replaced them, with the new values or not."""
        for module in self._module.modules():
            for name, buffer in module._buffers.items():
                kept = self._kept.get((module, name))
                if kept is not None and buffer is not None and buffer is not kept:
                    if values:
                        kept.copy_(buffer)
                    module._buffers[name] = kept

    def buffers(self) -> Buffers:
        """Return the module's buffers; those that it replaced are not the state's tensors any more."""
        kept = self._buffer_names
        return {name: b for name, b in self._module.named_buffers() if name in kept}


def no_loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
    """Stand in for the loss of a step that an engine gives its gradients."""
    raise RuntimeError("the trainer's step is given its gradients by an engine")


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def describe(batch: Any) -> str:
    """Describe a batch by its keys, shapes and dtypes, for messages."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, list | tuple):
        return "[" + ", ".join(describe(v) for v in batch[:8]) + "]"
    return type(batch).__name__
