"""The cross entropy of a linear head, without ever holding the logits of all rows.

Shapes: N rows (tokens), D features, V classes. A language model's logits (N, V) are often its largest
tensor by far: 16 x 1024 tokens over 50 304 classes take 3.3 GB in float32, and the backward pass wants
as much again. Here they exist for a few rows at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainstep.losses import Loss

_LOGITS = 2**26
"""Logits to a chunk if nobody says how many rows: 256 MiB of float32."""

Wanted = tuple[bool, ...]
"""Whether the gradients by hidden, weight and bias are wanted."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    """Return the cross entropy of ``hidden @ weight.T + bias`` against ``labels``, chunk by chunk.

    For a row with logits x, label y, p = softmax(x) and smoothing s, the loss and its gradients are

        loss = logsumexp(x) - (1 - s) x[y] - (s / V) sum(x)
        dx   = p - (1 - s) onehot(y) - s / V
        d hidden = dx @ weight,   d weight = dx.T @ hidden,   d bias = sum of dx over rows

    A linear head and a sum have no other inputs, so the gradients are known as soon as the chunk's
    logits are: the forward pass computes them, adds them up and drops the logits; the backward pass only
    multiplies by the incoming gradient. The method is that of the fused linear cross entropy of Hsu et
    al., 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", in plain PyTorch.

    The softmax is in float32 (float64 for float64 inputs) and gradients of weight and bias are added up
    in it. Under autocast the products are in autocast's type, as those of ``nn.Linear``. Nothing waits for
    the device and shapes depend on nothing but shapes, so it can be captured; the same inputs give the
    same bits. Where no gradient is wanted only the loss is computed.

    Args:
        hidden: (..., D), what the head is applied to.
        weight: (V, D), that of the ``nn.Linear``; tied to an embedding or not.
        labels: (...), integers: a class, or ``ignore_index``. They are not shifted.
        bias: (V,), or None.
        chunk: rows to compute at a time; None takes as many as have 2**26 logits.
        ignore_index: label of rows that do not count.
        label_smoothing: share of the target that is spread over all classes, as ``F.cross_entropy`` has it.

    Returns:
        The sum over the rows that count, and their number as a zero-dimensional int64 tensor. With none,
        the sum and all gradients are 0, and the mean is 0 / 0 = NaN, as that of ``F.cross_entropy``;
        added to others by micro-batches, they count for nothing.

    Raises:
        ValueError: for shapes that do not fit, a ``chunk`` below 1, smoothing outside [0, 1].
        TypeError: for labels that are no integers, or types of hidden, weight and bias that differ
            outside autocast.
        RuntimeError: when the gradient is differentiated again, or an operation on labels out of range.
    """
    _check(hidden, weight, labels, bias, chunk, label_smoothing)
    rows = chunk or max(_LOGITS // max(weight.shape[0], 1), 1)
    dtype = _compute_type(hidden, weight, bias)
    settings = _Settings(rows, ignore_index, float(label_smoothing), dtype)
    flat = labels.reshape(-1).long()
    inputs = (hidden.reshape(flat.numel(), hidden.shape[-1]), weight, bias)
    return Loss(_total(*inputs, flat, settings), (flat != ignore_index).sum())


class _Settings(NamedTuple):
    """How the loss is computed."""

    rows: int
    ignore_index: int
    smoothing: float
    dtype: torch.dtype  # in which products are computed


def _total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: _Settings
) -> Tensor:
    # Asked here, since under torch.func.grad the Function is given tensors that do not know.
    wanted = tuple(
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (hidden, weight, bias)
    )
    run = _LinearCrossEntropy.apply if any(wanted) else _run
    total: Tensor = run(hidden, weight, bias, labels, settings, wanted)[0]
    return total


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    settings: _Settings,
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the sum of the loss, and its gradients by hidden, weight and bias where wanted."""
    rows, dtype = settings.rows, settings.dtype
    wide = _wide(dtype)
    losses: list[Tensor] = []
    by_hidden: list[Tensor] = []
    by_weight = by_bias = None
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        for start in range(0, max(labels.shape[0], 1), rows):
            x = hidden[start : start + rows].to(dtype)
            logits = torch.nn.functional.linear(x, matrix, offset)
            loss, by_logits = _chunk(logits, labels[start : start + rows], settings, any(wanted))
            losses.append(loss)
            if wanted[2]:
                share = by_logits.sum(0)
                by_bias = share if by_bias is None else by_bias.add_(share)
            if wanted[0] or wanted[1]:
                # The logits are done with, so their memory serves for the gradient in their type.
                narrow = by_logits if dtype is wide else logits.copy_(by_logits)
                if wanted[0]:
                    by_hidden.append((narrow @ matrix).to(hidden.dtype))
                if wanted[1]:
                    by_weight = _add_product(by_weight, narrow.T, x, wide)
        return (
            torch.cat(losses).sum(),
            torch.cat(by_hidden) if by_hidden else None,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )


def _chunk(
    logits: Tensor, labels: Tensor, settings: _Settings, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the rows' losses (n,) and, if wanted, their gradient by the logits (n, V), both wide.

    Wide logits are overwritten; others are copied to a wider type first, once.
    """
    smoothing, classes = settings.smoothing, logits.shape[1]
    ignored = labels == settings.ignore_index
    place = labels.masked_fill(ignored, 0)[:, None]
    x = logits.to(_wide(logits.dtype))
    x.sub_(x.amax(1, keepdim=True))  # so that no exponential overflows; the loss is the same
    target = x.gather(1, place)[:, 0] * (1 - smoothing)
    if smoothing:
        target = target + x.sum(1) * (smoothing / classes)
    normalizer = x.exp_().sum(1, keepdim=True)
    loss = (normalizer[:, 0].log() - target).masked_fill(ignored, 0.0)
    if gradient:
        x.div_(normalizer)
        if smoothing:
            x.sub_(smoothing / classes)
        # Set and not added: sums in memory may be done in any order on a GPU.
        corrected = x.gather(1, place)[:, 0] - (1 - smoothing)
        x.index_put_((torch.arange(x.shape[0], device=x.device), place[:, 0]), corrected)
        x.masked_fill_(ignored[:, None], 0.0)
    return loss, x


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the loss by hidden, weight and bias; the gradients are further outputs.

    They count as differentiable, so that who differentiates them is told that this cannot be done, and
    does not get zeros.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: _Settings,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return _run(hidden, weight, bias, labels, settings, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *by_grads: Tensor | None) -> Any:
        # Dynamo traces this with a gradient for every output; compiled functions refuse it themselves.
        again = any(by_grad is not None for by_grad in by_grads)
        if again and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_cross_entropy: its gradient cannot be differentiated again. For second "
                "derivatives compute the logits: F.cross_entropy(F.linear(hidden, weight, bias), labels)."
            )
        scaled = (
            None if g is None or grad is None else g * grad.to(g.dtype) for g in ctx.saved_tensors
        )
        return (*scaled, None, None, None)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Add a matrix product to a running sum, which is wide; None begins one."""
    if total is None:
        return (left @ right).to(wide)
    if left.dtype is wide:
        return torch.addmm(total, left, right)
    return total.add_(left @ right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _compute_type(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    types = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if len(types) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise TypeError(
            f"linear_cross_entropy: hidden, weight and bias must have one dtype outside autocast, got "
            f"{names}; convert hidden with hidden.to(weight.dtype)"
        )
    return hidden.dtype


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    smoothing: float,
) -> None:
    where, shapes = "linear_cross_entropy", f"hidden {tuple(hidden.shape)}"
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{where}: hidden must be (..., D) and weight (V, D), got {shapes} and weight "
            f"{tuple(weight.shape)}; the weight of an nn.Linear is laid out so"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: labels must have a class for every row of hidden, shape "
            f"{tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: bias must be ({weight.shape[0]},), one number to a class, got "
            f"{tuple(bias.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"{where}: labels must be integers, class indices, got {labels.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where}: chunk must be at least 1 row, got {chunk}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing must be between 0 and 1, got {smoothing}")
