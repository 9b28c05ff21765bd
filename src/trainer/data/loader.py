"""Loaders whose batches are a function of (seed, epoch, position)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from trainer.data.collators import (
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)
from trainer.data.columns import FilteringCollator
from trainer.data.iterable import Stream
from trainer.data.lengths import sample_lengths
from trainer.data.order import Order
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.seeded import SeededCollator, SeededDataset
from trainer.data.seeding import WorkerInit, has_transform
from trainer.data.strategies import for_strategy
from trainer.data.stream_loader import StreamLoader
from trainer.plan import length_of

Collate = Callable[[list[Any]], Any]


def train_order(args: Any, dataset: Any, batch_size: int, processing_class: Any = None) -> Order:
    """Return the order in which ``args`` ask for the samples of a sized dataset.

    The default is the permutation that the Hugging Face Trainer would use, seeded ``data_seed`` (or
    ``seed``) + epoch.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    lengths = None
    if strategy == "group_by_length":
        names = getattr(processing_class, "model_input_names", None) or ["input_ids"]
        lengths = sample_lengths(
            dataset, length_column=args.length_column_name, input_name=names[0]
        )
    window = batch_size * args.gradient_accumulation_steps * args.world_size
    return for_strategy(strategy, len(dataset), seed=seed, lengths=lengths, batch_size=window)


def make_loader(
    dataset: Any,
    collate: Collate,
    args: Any,
    *,
    batch_size: int,
    order: Order | None,
    training: bool = False,
) -> DataLoader[Any]:
    """Build a loader.

    Args:
        dataset: map-style or iterable.
        collate: makes a batch from a list of samples.
        args: supplies seed, workers, pinning and ``dataloader_drop_last``.
        batch_size: samples in a batch of this process. Several processes take turns in the batches.
        order: the order of a map-style dataset; None for an iterable one, which has its own.
        training: whether batches go through ``Prefetch``. With workers a thread pins them; without,
            ``Prefetch`` pins those for which it is worth it.

    Each sample is fetched with Python, NumPy and PyTorch seeded from (seed, epoch, index), so random
    augmentation does not depend on workers, prefetching or resuming, and so is each batch collated.
    Parts that are known to draw nothing (see ``is_deterministic``) are spared that.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    workers, persistent = args.dataloader_num_workers, args.dataloader_persistent_workers
    drop_last = args.dataloader_drop_last
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": _pins(args, early=workers > 0 or not training),
        "persistent_workers": persistent,
        "worker_init_fn": WorkerInit(seed, args.process_index),
        "generator": torch.Generator(),  # else each pass would draw from the global one
    }
    if workers > 0:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
    seeded = not is_deterministic(dataset)
    seeded_collate = SeededCollator(collate, enabled=not is_deterministic(collate))
    if order is None:
        stream = Stream(
            dataset,
            batch_size,
            seed=seed,
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=drop_last,
            seeded=seeded,
            shared=persistent and workers > 0,
            progress=not args.disable_tqdm,
        )
        return StreamLoader(stream, seeded_collate, **options)
    return DataLoader(
        SeededDataset(dataset, seed, enabled=seeded),
        batch_sampler=GlobalBatchSampler(
            order, batch_size, args.world_size, args.process_index, drop_last=drop_last
        ),
        collate_fn=seeded_collate,
        **options,
    )


def _pins(args: Any, *, early: bool) -> bool:
    return early and bool(args.dataloader_pin_memory) and torch.cuda.is_available()


def is_deterministic(part: Any) -> bool:
    """Tell whether a dataset or collator is known to draw no random numbers, so needs no seeds.

    Known are lists, PyTorch's TensorDataset, tables of ``datasets`` without a transform, the plain
    collators, and views of these; anything else can say so by an attribute ``deterministic = True``,
    which also is how to switch seeding off.
    """
    declared = getattr(part, "deterministic", None)
    if declared is not None:
        return bool(declared)
    if isinstance(part, Subset):
        return is_deterministic(part.dataset)
    if isinstance(part, ConcatDataset):
        return all(map(is_deterministic, part.datasets))
    if isinstance(part, FilteringCollator):
        return is_deterministic(part.collate)
    if isinstance(
        part, list | tuple | TensorDataset | DefaultDataCollator | DataCollatorWithPadding
    ):
        return True
    if part in (default_data_collator, default_collate):
        return True
    # An iterable table runs its functions while it is read.
    table = hasattr(part, "column_names") and not isinstance(part, IterableDataset)
    return table and not has_transform(part)


def is_iterable(dataset: Any) -> bool:
    """Tell whether a dataset has no samples by index, so that it brings its own order."""
    return isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and length_of(dataset) is not None
    )
