"""Loaders: training data by position, evaluation data in order."""

from collections.abc import Callable
from typing import Any

from trainer.arguments import TrainingArguments
from trainer.data.collators import DataCollatorWithPadding, default_data_collator
from trainer.data.columns import FilteringCollator, keep_columns
from trainer.data.loader import is_iterable, make_loader, train_order
from trainer.data.order import Sequential
from trainer.facade.base import TrainerBase
from trainer.plan import make_plan, num_examples


class DataMixin(TrainerBase):
    """Loaders: training data by position, evaluation data in order."""

    def get_train_dataloader(self) -> Any:
        """Return the training loader: its order is a function of (seed, epoch, position)."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset")
        dataset, collate = self._without_unused(self.train_dataset, "training")
        order = None
        if not is_iterable(dataset):
            order = train_order(self.args, dataset, self._train_batch_size, self.processing_class)
        size = self._train_batch_size
        return make_loader(dataset, collate, self.args, batch_size=size, order=order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return an evaluation loader, in the order of the data; a string picks from a dict."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset")
        return self._sequential_loader(dataset, "evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader for ``predict``."""
        return self._sequential_loader(test_dataset, "test")

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any
    ) -> tuple[int, int, int, float, int, int | None, int]:
        """Return the lengths of a run.

        Returns:
            Epochs, updates per epoch, samples in the data, samples that will be seen, samples of an
            update, micro-batches per epoch (None if unknown), updates in all.
        """
        plan = make_plan(args, dataloader, self.get_total_train_batch_size(args))
        return (
            plan.num_train_epochs,
            plan.updates_per_epoch,
            plan.num_examples,
            plan.num_train_samples,
            plan.total_batch_size,
            plan.batches_per_epoch,
            plan.max_steps,
        )

    def num_examples(self, dataloader: Any) -> int:
        """Return the samples behind a loader."""
        return num_examples(dataloader, self.args.per_device_train_batch_size)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the samples of one update over all processes."""
        return self._train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _default_collator(self) -> Callable[[list[Any]], Any]:
        if hasattr(self.processing_class, "pad"):
            return DataCollatorWithPadding(self.processing_class)
        return default_data_collator

    def _without_unused(self, dataset: Any, what: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        if not self.args.remove_unused_columns:
            return dataset, self.data_collator
        names = [*self._signature, *self.label_names]
        return keep_columns(dataset, names, what), FilteringCollator(self.data_collator, names)

    def _sequential_loader(self, dataset: Any, what: str) -> Any:
        dataset, collate = self._without_unused(dataset, what)
        order = None if is_iterable(dataset) else Sequential(len(dataset))
        size = self.args.eval_batch_size
        return make_loader(dataset, collate, self.args, batch_size=size, order=order)
