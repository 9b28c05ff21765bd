"""The model of the GPU benchmarks: a plain GPT, and its sizes."""

from typing import Any

import torch
import torch.nn.functional as F
from attrs import asdict, frozen
from torch import Tensor, nn


@frozen
class Size:
    """Shape of a GPT, and of the batches it is measured on."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int


SIZES = {
    "small": Size(layers=4, width=128, heads=4, vocabulary=256, length=128, batch=8),
    "124M": Size(layers=12, width=768, heads=12, vocabulary=50304, length=1024, batch=16),
    "350M": Size(layers=24, width=1024, heads=16, vocabulary=50304, length=1024, batch=8),
}


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (
            part.view(shape).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))
        return x + F.dropout(hidden, self.dropout, self.training)


class GPT(nn.Module):
    """Returns ``{"loss"}`` for ``input_ids`` and ``labels``, both (batch, length), int64."""

    def __init__(self, size: Size, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, dropout) for _ in range(size.layers)
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def build(size: Size, device: str, dropout: float = 0.0, kind: type[GPT] = GPT) -> GPT:
    """Make a model with the same weights every time, on one kind of device."""
    torch.manual_seed(0)
    with torch.device(device):  # drawn there: hundreds of millions of numbers take the host seconds
        return kind(size, dropout)


def batch(size: Size, seed: int = 1) -> dict[str, Tensor]:
    """Make a batch of random tokens, on the host; labels are the tokens shifted by one."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1), generator=draws)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def flops(size: Size, parameters: int) -> float:
    """Count the operations of a step: 6 N + 12 L d T a token (Chowdhery et al., 2022, appendix B)."""
    attention = 12 * size.layers * size.width * size.length
    return (6 * parameters + attention) * size.batch * size.length


def describe(size: Size) -> dict[str, Any]:
    """Return the size as a dict, for reports."""
    return asdict(size)
