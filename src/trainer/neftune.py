"""NEFTune: uniform noise on the input embeddings while training."""

import math
from types import TracebackType
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer import modeling


@define(eq=False)
class NoiseHandle:
    """Noise on a model, until ``detach`` or the end of a ``with`` block."""

    _hook: RemovableHandle

    def detach(self) -> None:
        """Take the noise off; a second time does nothing."""
        self._hook.remove()

    def __enter__(self) -> "NoiseHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(model: nn.Module, alpha: float) -> NoiseHandle:
    """Add noise to what the input embeddings return, in training mode only.

    Every entry of the embedded batch (..., L, d) gets a draw from U(-m, m), with
    m = alpha / sqrt(L * d) (Jain et al., 2023, "NEFTune: Noisy Embeddings Improve Instruction
    Finetuning"). The draws come from the device's default generator, so whoever seeds that decides
    them.

    Args:
        model: has ``get_input_embeddings``; PyTorch's wrappers are looked through.
        alpha: strength of the noise; 5 to 15 in the paper.

    Raises:
        ValueError: if ``alpha`` is negative or not finite, or the model does not tell its input
            embeddings.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(
            f"neftune_noise_alpha must be a finite number, at least 0, got {alpha!r}; the paper uses "
            "5, 10 and 15. None adds no noise."
        )

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    add_noise.recordable = True  # type: ignore[attr-defined]  # does nothing on the host
    return NoiseHandle(_input_embeddings(model).register_forward_hook(add_noise))


def _input_embeddings(model: nn.Module) -> nn.Module:
    model = modeling.unwrap(model)
    find = getattr(model, "get_input_embeddings", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # models without token embeddings inherit the method
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"neftune_noise_alpha: {type(model).__name__} does not tell its input embeddings. Give it "
            "a method get_input_embeddings() that returns their module, or set "
            "neftune_noise_alpha=None."
        )
    return found
