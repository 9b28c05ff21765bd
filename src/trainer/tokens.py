"""Counting what a run has seen: input tokens, and an estimate of its floating-point operations."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trainer import modeling

logger = logging.getLogger(__name__)

COUNTS = ("all", "non_padding", "no")

_parameters: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()


class TokenCounter:
    """Counts the input tokens of batches, without ever waiting for a device.

    Batches are best added before they go to the device. Tensors that are there already are added up
    there, and read with ``total``.

    Args:
        how: ``"all"`` counts the elements of the main input; ``"non_padding"`` those that
            ``attention_mask`` (of shape (batch, length)) keeps, or without a mask those that differ from
            ``pad_token_id``; ``"no"`` counts nothing.
        main_input_name: the batch's key for the main input.
        pad_token_id: None counts all where there is no mask.

    Raises:
        ValueError: for another ``how``.
    """

    def __init__(
        self, how: str, main_input_name: str = "input_ids", pad_token_id: int | None = None
    ) -> None:
        if how not in COUNTS:
            raise ValueError(
                f"include_num_input_tokens_seen: {how!r} is not valid; choose {', '.join(COUNTS)}"
            )
        self.how = how
        self.main_input_name = main_input_name
        self.pad_token_id = pad_token_id
        self._counted = 0
        self._pending: dict[Any, Tensor] = {}
        self._warned: set[str] = set()

    def add(self, batch: Any) -> None:
        """Count a batch. One that has no main input counts nothing, and is warned of once."""
        if self.how == "no":
            return
        main = _main_input(batch, self.main_input_name)
        if main is None:
            self._warn(
                f"Tokens cannot be counted: the batch has no tensor {self.main_input_name!r}, the "
                "model's main_input_name. Such batches count as none."
            )
            return
        counted = main.numel() if self.how == "all" else self._without_padding(batch, main)
        if isinstance(counted, int):
            self._counted += counted
        elif counted.device.type == "cpu":
            self._counted += int(counted)
        else:
            before = self._pending.get(counted.device)
            self._pending[counted.device] = counted if before is None else before + counted

    @property
    def total(self) -> int:
        """Tokens counted so far; waits for the devices on which some were counted."""
        self._counted += sum(int(tokens) for tokens in self._pending.values())
        self._pending.clear()
        return self._counted

    @total.setter
    def total(self, tokens: int) -> None:
        self._pending.clear()
        self._counted = tokens

    def _without_padding(self, batch: Mapping[str, Any], main: Tensor) -> Tensor | int:
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim <= 2:  # more axes tell pairs of tokens
            return mask.sum()
        if self.pad_token_id is not None:
            return (main != self.pad_token_id).sum()
        self._warn(
            "Padding cannot be told from tokens: the batch has no attention_mask of shape (batch, "
            "length), and there is no pad_token_id. All tokens are counted."
        )
        return main.numel()

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def floating_point_ops(model: nn.Module, inputs: Any) -> int:
    """Estimate the floating-point operations of training on a batch.

    6 * (elements of the main input) * (parameters outside embeddings), as in Kaplan et al., 2020,
    "Scaling Laws for Neural Language Models". The parameters are counted once per model; see
    ``recount_parameters``.

    Returns:
        0 if the batch has no main input, or the model no ``num_parameters(exclude_embeddings=...)``.
    """
    model = modeling.unwrap(model)
    count = _parameters.get(model)
    if count is None:
        count = _parameters[model] = _count_parameters(model)
    if not count:
        return 0
    main = _main_input(inputs, getattr(model, "main_input_name", "input_ids"))
    return 0 if main is None else 6 * main.numel() * count


def recount_parameters(model: nn.Module) -> None:
    """Let ``floating_point_ops`` count a model's parameters anew, whose size may have changed."""
    _parameters.pop(modeling.unwrap(model), None)


def main_input_name(model: nn.Module) -> str:
    """Return the batch's key for a model's main input: its ``main_input_name``, or ``input_ids``."""
    return getattr(modeling.unwrap(model), "main_input_name", "input_ids")


def _main_input(batch: Any, name: str) -> Tensor | None:
    main = batch.get(name) if isinstance(batch, Mapping) else None
    return main if isinstance(main, Tensor) else None


def _count_parameters(model: nn.Module) -> int:
    count = getattr(model, "num_parameters", None)
    if not callable(count) or "exclude_embeddings" not in inspect.signature(count).parameters:
        return 0
    return int(count(exclude_embeddings=True))
