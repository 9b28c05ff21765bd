"""Small modules, one per way in which a module can be awkward to call as a function.

All of them map ``x`` of shape (n, 4) to (n, 2), so that one batch maker and one loss fit all.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

IN, HIDDEN, OUT, VOCAB = 4, 6, 2, 7


class TiedEmbedding(nn.Module):
    """An embedding and an output layer that are one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.mixer = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 3).long() % VOCAB
        return self.head(self.mixer(self.embedding(ids)).tanh().mean(dim=1))[:, :OUT]


class Recurrent(nn.Module):
    """A GRU or LSTM, whose ``forward`` looks its weights up in a list of its own."""

    def __init__(self, kind: type[nn.RNNBase], hook: Callable[[nn.Module], Any] | None = None):
        super().__init__()
        self.rnn = kind(2, HIDDEN, batch_first=True)
        if hook is not None:
            hook(self.rnn)
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x.reshape(-1, IN // 2, 2))
        return self.head(states[:, -1])


class Checkpointed(nn.Module):
    """Two blocks with dropout; with ``recompute`` they run again in the backward pass."""

    def __init__(self, *, recompute: bool, norm: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Dropout(0.3))
        self.norm = nn.LayerNorm(HIDDEN) if norm else nn.Identity()
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.norm(x))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class CustomFunction(nn.Module):
    """A hand-written autograd Function between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(IN, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Square.apply(self.body(x)))


class Counting(nn.Module):
    """Buffers of three kinds: replaced by assignment, updated in place, and not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(IN, OUT)
        self.register_buffer("average", torch.zeros(OUT))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(OUT), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(dim=0)
            self.calls += 1
            self.last.copy_(y.detach()[0])
        return y - self.average


def mlp() -> nn.Module:
    """Two linear layers: no state, no randomness."""
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def dropout() -> nn.Module:
    """Draws random numbers in training."""
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Dropout(0.5), nn.Linear(HIDDEN, OUT))


def batch_norm() -> nn.Module:
    """Keeps running statistics, and a count in int64."""
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, OUT))


def frozen() -> nn.Module:
    """The first layer and one bias do not train."""
    model = mlp()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def weight_norm_old() -> nn.Module:
    """A hook overwrites a plain tensor attribute before each call."""
    model = mlp()
    _old_weight_norm(model[0], "weight")
    return model


def weight_norm_lstm() -> nn.Module:
    """The same hook inside an LSTM, whose list of weights it writes to."""
    return Recurrent(nn.LSTM, lambda rnn: _old_weight_norm(rnn, "weight_hh_l0"))


def _old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


def spectral_norm_old() -> nn.Module:
    """A hook that keeps buffers and overwrites a plain tensor attribute."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model[0])
    return model


def weight_norm() -> nn.Module:
    """A parametrization without buffers."""
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def spectral_norm() -> nn.Module:
    """A parametrization that updates buffers in training."""
    model = mlp()
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "dropout": dropout,
    "batch_norm": batch_norm,
    "frozen": frozen,
    "tied": TiedEmbedding,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "weight_norm": weight_norm,
    "weight_norm_old": weight_norm_old,
    "weight_norm_lstm": weight_norm_lstm,
    "spectral_norm": spectral_norm,
    "spectral_norm_old": spectral_norm_old,
    "checkpointed": lambda: Checkpointed(recompute=True),
    "custom_function": CustomFunction,
    "counting": Counting,
}
"""Makers by name."""

STATEFUL = ("batch_norm", "counting", "spectral_norm", "spectral_norm_old")
"""Models whose training mode changes buffers."""
RANDOM = ("dropout", "checkpointed")
"""Models whose training mode draws random numbers."""


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Make a model; equal arguments give equal bits, and the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
    return model.to(dtype)


def batch(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make a batch of ``n`` samples: ``x`` (n, 4), ``y`` (n, 2) and integer weights ``w`` (n,)."""
    gen = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, IN, generator=gen, dtype=torch.float64).to(dtype),
        "y": torch.randn(n, OUT, generator=gen, dtype=torch.float64).to(dtype),
        "w": torch.randint(0, 4, (n,), generator=gen),
    }


def batches(count: int, n: int = 6, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Make ``count`` different batches."""
    return [batch(n, seed=100 + i, dtype=dtype) for i in range(count)]


def mean_loss(call: Callable[..., Tensor], data: dict[str, Tensor]) -> Tensor:
    """The mean squared error: a scalar mean over the batch."""
    return mse_loss(call(data["x"]), data["y"])
