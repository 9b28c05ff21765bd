"""How long a training is: epochs, updates and samples, from the arguments and the loader."""

import math
import sys
from typing import Any

from attrs import frozen


@frozen
class Plan:
    """The lengths of a run.

    Attributes:
        num_train_epochs: epochs to begin; ``sys.maxsize`` for data of unknown length.
        max_steps: updates in the whole run.
        updates_per_epoch: updates in one epoch; ``max_steps`` for data of unknown length.
        batches_per_epoch: micro-batches in one epoch and process, None if unknown.
        num_examples: samples in the dataset.
        num_train_samples: samples the whole run will see, repeats included.
        total_batch_size: samples of one update over all processes.
    """

    num_train_epochs: int
    max_steps: int
    updates_per_epoch: int
    batches_per_epoch: int | None
    num_examples: int
    num_train_samples: float
    total_batch_size: int

    @classmethod
    def from_values(
        cls,
        num_train_epochs: int,
        updates_per_epoch: int,
        num_examples: int,
        num_train_samples: float,
        total_batch_size: int,
        batches_per_epoch: int | None,
        max_steps: int,
    ) -> "Plan":
        """Make a plan from what ``Trainer.set_initial_training_values`` returns, in its order."""
        return cls(
            num_train_epochs,
            max_steps,
            updates_per_epoch,
            batches_per_epoch,
            num_examples,
            num_train_samples,
            total_batch_size,
        )

    def epoch_fraction(self, batches: int, accumulation: int) -> float:
        """Return which part of an epoch ``batches`` micro-batches are."""
        return batches / (self.batches_per_epoch or self.max_steps * accumulation)


def make_plan(args: Any, loader: Any, total_batch_size: int, examples: int | None = None) -> Plan:
    """Compute the lengths of a run.

    Args:
        args: the training arguments.
        loader: the training data.
        total_batch_size: samples of one update.
        examples: samples in the data, if the loader is not to be asked.

    Raises:
        ValueError: for a loader without length and no ``max_steps``; for one without any batch.
    """
    accumulation = args.gradient_accumulation_steps
    batches = length_of(loader)
    if batches is None:
        if args.max_steps <= 0:
            raise ValueError(
                "the training data has no length, so epochs cannot be counted: set max_steps, which "
                f"is {args.max_steps}, to the number of updates"
            )
        samples = args.max_steps * total_batch_size
        return Plan(
            sys.maxsize, args.max_steps, args.max_steps, None, samples, samples, total_batch_size
        )
    if batches == 0:
        raise ValueError(
            "the training data holds no batch: the dataset has "
            f"{length_of(getattr(loader, 'dataset', ()))} samples, a batch takes "
            f"{args.per_device_train_batch_size}, and dataloader_drop_last is "
            f"{args.dataloader_drop_last}"
        )
    updates = math.ceil(batches / accumulation)
    if examples is None:
        examples = num_examples(loader, args.per_device_train_batch_size)
    if args.max_steps >= 0:
        # Zero means one update, as the loop only looks at the limit after an update.
        epochs = math.ceil(max(args.max_steps, 1) / updates)
        samples = args.max_steps * total_batch_size
        return Plan(epochs, args.max_steps, updates, batches, examples, samples, total_batch_size)
    max_steps = math.ceil(args.num_train_epochs * updates)
    seen = examples * args.num_train_epochs
    epochs = math.ceil(args.num_train_epochs)
    return Plan(epochs, max_steps, updates, batches, examples, seen, total_batch_size)


def length_of(value: Any) -> int | None:
    """Return ``len(value)``, or None if it has none."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def num_examples(loader: Any, batch_size: int) -> int:
    """Return the samples behind a loader, estimated from its batches if its dataset has no length."""
    size = length_of(getattr(loader, "dataset", None))
    if size is not None:
        return size
    return (length_of(loader) or 0) * batch_size
