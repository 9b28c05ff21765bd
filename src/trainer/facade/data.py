"""Loaders: training data by position, evaluation data in order."""

import inspect
from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch.utils.data import Sampler

from trainer import modeling
from trainer.arguments import TrainingArguments
from trainer.data.collators import DataCollatorWithPadding, default_data_collator
from trainer.data.columns import LABELS, FilteringCollator, keep_columns
from trainer.data.loader import is_iterable, make_loader, train_order
from trainer.data.order import Order, Sequential
from trainer.data.torch_samplers import OrderSampler, as_order
from trainer.distributed.ranks import rows_of_rank
from trainer.facade.base import TrainerBase
from trainer.plan import make_plan, num_examples


@frozen(eq=False)
class _Kept:
    """An evaluation loader with persistent workers, and what it was made for."""

    loader: Any
    dataset: Any
    collate: Any
    batch_size: int

    def serves(self, dataset: Any, collate: Any, batch_size: int) -> bool:
        same = self.dataset is dataset and self.collate is collate
        return same and self.batch_size == batch_size


class DataMixin(TrainerBase):
    """Loaders: training data by position, evaluation data in order."""

    _signature_columns: list[str] | None = None

    def get_train_dataloader(self) -> Any:
        """Return the training loader: its order is a function of (seed, epoch, position)."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset")
        dataset, collate = self._without_unused(self.train_dataset, "training")
        order = self._order(self._get_train_sampler, dataset)
        size = rows_of_rank(self.args, self._train_batch_size)
        return make_loader(dataset, collate, self.args, batch_size=size, order=order, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return an evaluation loader, in the order of the data; a string picks from a dict.

        With ``dataloader_persistent_workers`` the loader of each name is kept and given again, as long
        as it is for the same data.
        """
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset")
        if not self.args.dataloader_persistent_workers:
            return self._evaluation_loader(dataset, "evaluation")
        kept: dict[str, _Kept] = self.__dict__.setdefault("_eval_dataloaders", {})
        source = (dataset, self.data_collator, self.args.eval_batch_size)
        if name not in kept or not kept[name].serves(*source):
            kept.pop(name, None)  # ends its workers
            kept[name] = _Kept(self._evaluation_loader(dataset, "evaluation"), *source)
        return kept[name].loader

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader for ``predict``."""
        return self._evaluation_loader(test_dataset, "test")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Return the sampler of the training data, by ``train_sampling_strategy``.

        An override may return any ``torch.utils.data.Sampler`` that has a length, or None for the order
        of the data. It is not asked about data that have no length.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or is_iterable(dataset):
            return None
        size = rows_of_rank(self.args, self._train_batch_size)
        return OrderSampler(train_order(self.args, dataset, size, self.processing_class))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """Return the sampler of evaluation and test data: their own order, unless overridden."""
        if eval_dataset is None or is_iterable(eval_dataset):
            return None
        return OrderSampler(Sequential(len(eval_dataset)))

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any
    ) -> tuple[int, int, int, float, int, int | None, int]:
        """Return the lengths of a run.

        Returns:
            Epochs, updates per epoch, samples in the data, samples that will be seen, samples of an
            update, micro-batches per epoch (None if unknown), updates in all.
        """
        total, examples = self.get_total_train_batch_size(args), self.num_examples(dataloader)
        plan = make_plan(args, dataloader, total, examples)
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
        shared = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        processes = args.world_size // shared  # those that work on samples of their own
        rows = rows_of_rank(args, self._train_batch_size)
        return rows * args.gradient_accumulation_steps * processes

    def _default_collator(self) -> Callable[[list[Any]], Any]:
        # Image processors and others can pad too, but not rows of tokens: those are what has a side.
        if hasattr(self.processing_class, "pad") and hasattr(self.processing_class, "padding_side"):
            return DataCollatorWithPadding(self.processing_class)
        return default_data_collator

    def _without_unused(self, dataset: Any, what: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        collate = self.data_collator
        if not self.args.remove_unused_columns:
            return dataset, collate
        dataset = self._remove_unused_columns(dataset, what)
        return dataset, self._get_collator_with_removed_columns(collate, what)

    def _set_signature_columns_if_needed(self) -> None:
        """Set ``self._signature_columns``, the names that are kept of the data, unless they are set.

        They are the parameters of the model's ``forward`` and the labels. An override, or a subclass that
        assigns them, decides what its collator or its loss gets to see.
        """
        if self._signature_columns is None:
            names = [*modeling.forward_names(self.model), *LABELS, *self.label_names]
            self._signature_columns = list(dict.fromkeys(names))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Return a table without the columns that are not used; other data as they are."""
        self._set_signature_columns_if_needed()
        return keep_columns(dataset, self._signature_columns or [], description or "given")

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[[list[Any]], Any], description: str | None = None
    ) -> Callable[[list[Any]], Any]:
        """Return a collator that drops from samples what is not used, then does what the given one does."""
        self._set_signature_columns_if_needed()
        return FilteringCollator(data_collator, self._signature_columns or [])

    def _evaluation_loader(self, dataset: Any, what: str) -> Any:
        dataset, collate = self._without_unused(dataset, what)
        order = self._order(self._get_eval_sampler, dataset)
        size = rows_of_rank(self.args, self.args.eval_batch_size)
        return make_loader(dataset, collate, self.args, batch_size=size, order=order)

    def _order(self, get_sampler: Callable[..., Any], dataset: Any) -> Order | None:
        """Return the order that a sampler hook asks for; None for data that bring their own."""
        if is_iterable(dataset):
            return None
        # Overrides of older scripts are defined without a parameter for the dataset.
        given = (dataset,) if inspect.signature(get_sampler).parameters else ()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return as_order(get_sampler(*given), len(dataset), seed)
