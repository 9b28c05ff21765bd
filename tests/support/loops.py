"""The plain PyTorch training loop that the pure step is held against."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    scheduler: Any = None,
    max_norm: float | None = None,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """Train ``model`` in place as anybody would; returns loss, norm and rate of every step.

    With ``parts`` above 1 each batch is cut along the leading axis and ``loss / parts`` accumulated.
    """
    history = []
    for batch in batches:
        rate = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad(set_to_none=True)
        values = []
        for i in range(parts):
            piece = {n: t.tensor_split(parts)[i] for n, t in batch.items()}
            value = loss(model, piece)
            (value / parts if parts > 1 else value).backward()
            values.append(value.detach())
        norm = None
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        history.append({"loss": sum(values) / parts, "grad_norm": norm, "lr": rate})
    return history


def assert_same_tensors(given: dict[str, Tensor], model: nn.Module) -> None:
    """Assert that ``given`` has the bits of the model's tensors of the same names."""
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in given.items():
        assert torch.equal(tensor, wanted[name]), name
