"""How a micro-batch becomes a loss and gradients; every method may be overridden."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trainer import modeling
from trainer.evaluation.half import cast_inputs
from trainer.facade.base import TrainerBase
from trainer.losses import count_label_items, loss_from_outputs
from trainer.memory import empty_cache
from trainer.smoothing import shifts_labels
from trainer.tokens import floating_point_ops

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossMixin(TrainerBase):
    """How a micro-batch becomes a loss and gradients; every method may be overridden."""

    _loss_factor: float = 1

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one micro-batch forward and backward, adding to the parameters' ``.grad``.

        Returns:
            This micro-batch's share of the loss, detached.
        """
        if not model.training:
            model.train()
        self._switch_optimizer("train")
        inputs = self._prepare_inputs(inputs)
        if not self._loss_takes_items:
            num_items_in_batch = None  # an override that knows no counts returns plain means
        with self.compute_loss_context_manager():
            loss = self._call_compute_loss(model, inputs, items=num_items_in_batch)
        window = self.current_gradient_accumulation_steps
        if window > 1 and not self._divides_by_items(num_items_in_batch):
            loss = loss / window
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any trainable parameter, so there is nothing to train. "
                "Check that it is computed from the model's output with gradients enabled, and that "
                "some parameter has requires_grad=True."
            )
        steps = self.args.torch_empty_cache_steps
        if steps is not None and self.state.global_step % steps == 0:
            empty_cache(self.args.device)
        self._backward(loss)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and return its loss, or ``(loss, outputs)``.

        An override may leave out ``num_items_in_batch``; its loss is then taken as a mean, and divided
        by the micro-batches of an update.

        Raises:
            ValueError: if the outputs hold no loss, listing what they and the inputs hold.
        """
        labels = None
        outside = self.compute_loss_func is not None or self.label_smoother is not None
        if outside and "labels" in inputs:
            labels = inputs["labels"]
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif self.label_smoother is not None and labels is not None:
            shift = shifts_labels(model)
            loss = self.label_smoother(outputs, labels, shift, num_items_in_batch)
        else:
            loss = loss_from_outputs(outputs, inputs)
        if num_items_in_batch is not None and self._divides_by_items(num_items_in_batch):
            # Processes average their gradients, but the items are those of all of them.
            loss = loss * self._loss_factor if self._loss_factor != 1 else loss
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Return the context that losses are computed in: autocast, if a half type is asked for."""
        stack = ExitStack()
        stack.enter_context(self.autocast_smart_context_manager())
        return stack

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        """Return the autocast of ``args.bf16`` or ``args.fp16``; a context without effect else.

        DeepSpeed's engine has parameters of that type instead.
        """
        dtype = _HALF.get(self.args.mixed_precision)
        if dtype is None or (self._zero is not None and self._zero.engine is not None):
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype, cache_enabled=cache_enabled)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device | None = None
    ) -> tuple[list[Any], Tensor | int | None]:
        """Take the micro-batches of an update, and count what their loss is divided by.

        Returns:
            Up to ``num_batches`` batches, none at the end of the epoch, and ``count_items`` of them: during
            training with ``average_tokens_across_devices`` of those of all processes. A batch is None if
            only other processes have one.
        """
        window = list(islice(epoch_iterator, num_batches))
        own = [batch for batch in window if batch is not None]
        items = self.count_items(own) if own else None
        if window and self._run is not None and self.args.average_tokens_across_devices:
            items = self._run.take.share_items(items)
        if isinstance(items, Tensor) and device is not None:
            items = items.to(device, non_blocking=True)
        return window, items

    def count_items(self, window: list[Any]) -> Tensor | int | None:
        """Count the labels in a window that a model with loss kwargs divides its loss by."""
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            return None
        if self.label_smoother is not None and self.compute_loss_func is None:
            return self.label_smoother.count(window, shifts_labels(self.model))
        return count_label_items(window)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate the operations of a batch, forward and backward; 0 where it cannot be told."""
        return floating_point_ops(self.model, inputs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = self._prepare_input(inputs)
        if isinstance(prepared, Mapping) and not prepared:
            raise ValueError(
                "the batch is empty: none of the dataset's keys reached the model, whose forward "
                f"takes {', '.join(modeling.forward_names(self.model))}. Rename the dataset's "
                "columns, or set remove_unused_columns=False."
            )
        return prepared

    def _prepare_input(self, data: Any) -> Any:
        """Return nested data with its tensors on the device; for DeepSpeed in its type, but for labels."""
        data = modeling.move(data, self.args.device, non_blocking=True)
        zero = self._zero
        if zero is None or zero.engine is None or zero.half is None:
            return data
        return cast_inputs(data, getattr(torch, zero.half), self.label_names)

    def _call_compute_loss(self, model: Any, inputs: Any, *, items: Any, **options: Any) -> Any:
        if self._loss_takes_items:
            options["num_items_in_batch"] = items
        return self.compute_loss(model, inputs, **options)

    def _divides_by_items(self, items: Any) -> bool:
        """Whether the loss of a micro-batch is its share of the update's mean already."""
        if not self._loss_takes_items:
            return False
        return self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and items is not None
        )
