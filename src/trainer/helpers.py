"""Small functions that scripts import beside the Trainer; the Trainer itself does without them."""

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler

from trainer import checkpoint, modeling
from trainer.data.grouped import LengthGrouped
from trainer.data.lengths import sample_lengths
from trainer.evaluation.collected import PADDING, join
from trainer.evaluation.nested import detached
from trainer.plan import length_of

logger = logging.getLogger(__name__)


def get_last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint in a folder that is complete and undamaged; None if there is none.

    All of its files are read to tell. Newer ones that are passed over are warned of.
    """
    path, skipped = checkpoint.newest(folder)
    for damaged, reason in skipped:
        logger.warning("Checkpoint %s is passed over: %s", damaged, reason)
    return None if path is None else str(path)


def has_length(dataset: Any) -> bool:
    """Tell whether ``len(dataset)`` works."""
    return length_of(dataset) is not None


def number_of_arguments(func: Callable[..., Any]) -> int:
    """Count the parameters of a function; of a ``functools.partial``, those that are still free."""
    if isinstance(func, functools.partial):
        free = len(inspect.signature(func.func).parameters)
        return free - len(func.args) - len(func.keywords)
    return len(inspect.signature(func).parameters)


def get_parameter_names(
    model: nn.Module,
    forbidden_layer_types: Iterable[type],
    forbidden_layer_names: Sequence[str] | None = None,
) -> list[str]:
    """Return the names of a model's parameters that are outside of some layers.

    Args:
        model: whose parameters; shared ones are named each time.
        forbidden_layer_types: classes of submodules whose parameters are left out, and those inside.
        forbidden_layer_names: regular expressions; left out is what one of them is found in, tested
            against the lower-cased name as seen from every module above it.
    """
    patterns = [re.compile(pattern) for pattern in forbidden_layer_names or ()]
    types = tuple(forbidden_layer_types)

    def allowed(name: str) -> bool:
        return not any(pattern.search(name.lower()) for pattern in patterns)

    def names(module: nn.Module) -> Iterator[str]:
        for prefix, child in module.named_children():
            if not isinstance(child, types):
                yield from filter(allowed, (f"{prefix}.{name}" for name in names(child)))
        yield from filter(allowed, module._parameters)

    return list(names(model))


def get_model_param_count(model: nn.Module, trainable_only: bool = False) -> int:
    """Count the numbers in a model's parameters, or in those with ``requires_grad``."""
    return sum(
        modeling.numel(p) for p in model.parameters() if p.requires_grad or not trainable_only
    )


def nested_concat(tensors: Any, new_tensors: Any, padding_index: int = PADDING) -> Any:
    """Join nested tensors or arrays along the first axis, padding the second to the wider one.

    Tensors are joined where the first ones are, and keep their dtype.

    Raises:
        TypeError: if their structures differ.
        ValueError: if they differ in more than the first two axes.
    """
    return join([detached(tensors), detached(new_tensors)], "nested_concat", padding_index)


@contextmanager
def torch_distributed_zero_first(local_rank: int) -> Iterator[None]:
    """Run a block on the process of rank 0 of each machine first; the others wait for it.

    Args:
        local_rank: of this process; -1 or 0 without others.
    """
    if local_rank not in (-1, 0):
        torch.distributed.barrier()
    yield
    if local_rank == 0 and torch.distributed.is_initialized():
        torch.distributed.barrier()


class LengthGroupedSampler(Sampler[int]):
    """Samples of similar length stand together, the longest of all first; see ``LengthGrouped``.

    Args:
        batch_size: samples in a batch.
        dataset: whose lengths to take, unless ``lengths`` are given.
        lengths: one number for each sample.
        model_input_name: the sample's key whose length counts; "input_ids" by default.
        generator: draws the seed of every pass; None takes the global one of PyTorch.

    Raises:
        ValueError: without dataset and lengths, or if lengths cannot be told.
    """

    def __init__(
        self,
        batch_size: int,
        dataset: Any = None,
        lengths: Sequence[int] | None = None,
        model_input_name: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if dataset is None and lengths is None:
            raise ValueError("LengthGroupedSampler needs a dataset or lengths")
        if lengths is None:
            lengths = sample_lengths(dataset, length_column=None, input_name=model_input_name)
        self.batch_size, self.lengths, self.generator = batch_size, lengths, generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.randint(1 << 62, (), generator=self.generator))
        order = LengthGrouped(self.lengths, self.batch_size, seed)
        return iter(order.indices(0, 0, len(order)).tolist())
