"""Loaders whose batches are a function of (seed, epoch, position)."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from attrs import evolve
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
from trainer.data.lengths import sample_lengths
from trainer.data.order import Order, for_strategy
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.seeding import SeededCollator, SeededDataset, WorkerInit, has_transform, mix
from trainer.plan import length_of

logger = logging.getLogger(__name__)

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
    window = batch_size * args.gradient_accumulation_steps
    return for_strategy(strategy, len(dataset), seed=seed, lengths=lengths, batch_size=window)


def make_loader(
    dataset: Any,
    collate: Collate,
    args: Any,
    *,
    batch_size: int,
    order: Order | None,
) -> DataLoader[Any]:
    """Build a loader.

    Args:
        dataset: map-style or iterable.
        collate: makes a batch from a list of samples.
        args: supplies seed, workers, pinning and ``dataloader_drop_last``.
        batch_size: samples in a batch.
        order: the order of a map-style dataset; None for an iterable one, which has its own.

    Each sample of a map-style dataset is fetched with Python, NumPy and PyTorch seeded from (seed,
    epoch, index), so random augmentation does not depend on workers, prefetching or resuming.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    options: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": bool(args.dataloader_pin_memory) and torch.cuda.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "worker_init_fn": WorkerInit(seed),
        "generator": torch.Generator(),  # else each pass would draw from the global one
    }
    if args.dataloader_num_workers > 0:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
    if order is None:
        drop_last = args.dataloader_drop_last
        return DataLoader(dataset, batch_size, collate_fn=collate, drop_last=drop_last, **options)
    sampler = GlobalBatchSampler(order, batch_size, drop_last=args.dataloader_drop_last)
    seeded = not (is_deterministic(dataset) and is_deterministic(collate))
    return DataLoader(
        SeededDataset(dataset, seed, enabled=seeded),
        batch_sampler=sampler,
        collate_fn=SeededCollator(collate),
        **options,
    )


def is_deterministic(part: Any) -> bool:
    """Tell whether a dataset or collator is known to draw no random numbers, so needs no seeds.

    Known are lists, PyTorch's TensorDataset, tables of ``datasets`` without a transform, the plain
    collators, and views of these; anything else can say so by an attribute ``deterministic = True``.
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
    return hasattr(part, "column_names") and not has_transform(part)


def is_iterable(dataset: Any) -> bool:
    """Tell whether a dataset has no samples by index, so that it brings its own order."""
    return isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and length_of(dataset) is not None
    )


def batches_from(loader: Iterable[Any], epoch: int, skip: int) -> Iterator[Any]:
    """Iterate over the batches of ``epoch``, beginning with number ``skip``.

    Our own loaders seek without reading anything. Others are asked to ``set_epoch`` and the batches
    to skip are produced and dropped, with a warning.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, GlobalBatchSampler):
        sampler.set_position(epoch, skip)
        _seed_workers(loader, epoch)
        yield from loader
        return
    inner = (getattr(loader, "sampler", None), getattr(loader, "dataset", None))
    for owner in (loader, sampler, *inner):
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
            break
    _seed_workers(loader, epoch)
    iterator = iter(loader)
    if skip:
        logger.warning(
            "The training data cannot seek: %d batches are read again and dropped to reach the "
            "position of the checkpoint.",
            skip,
        )
        for _ in islice(iterator, skip):
            pass
    yield from iterator


def _seed_workers(loader: Any, epoch: int) -> None:
    """Make what workers of our loaders draw, outside a sample's seeding, a function of the epoch."""
    start = getattr(loader, "worker_init_fn", None)
    if isinstance(start, WorkerInit):
        loader.worker_init_fn = evolve(start, epoch=epoch)
        loader.generator.manual_seed(mix(start.seed, epoch))  # for get_worker_info().seed
