"""Fields on datasets, their order, and loaders."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass

from .option import option


@dataclass(repr=False)
class DataFields:
    """Which rows and columns are read, in which order, by which workers."""

    ignore_data_skip: bool = option(
        False, "When resuming, start the epoch's data again instead of after the rows seen."
    )
    data_seed: int | None = option(None, "Seed of the order of the data. None: seed.")
    dataloader_drop_last: bool = option(False, "Leave out a last, incomplete batch.")
    dataloader_num_workers: int = option(
        0, "Processes that load data; 0 loads in the main process."
    )
    dataloader_pin_memory: bool = option(
        True, "Pin batches in host memory, so that the GPU need not be waited for to copy them."
    )
    dataloader_persistent_workers: bool = option(False, "Keep workers alive between epochs.")
    dataloader_prefetch_factor: int | None = option(
        None, "Batches that each worker loads ahead. Only with workers."
    )
    remove_unused_columns: bool = option(
        True, "Drop the columns that the model's forward does not name."
    )
    label_names: list[str] | None = option(
        None, "Keys of the batch that hold labels. None: forward's parameters with 'label' in them."
    )
    train_sampling_strategy: str = option(
        "random",
        "Order of the training rows; group_by_length puts rows of similar length in one batch, feistel "
        "is random without keeping an order in memory, for very many rows.",
        choices=("random", "sequential", "group_by_length", "feistel"),
    )
    length_column_name: str = option(
        "length", "Column with ready-made lengths for group_by_length."
    )
