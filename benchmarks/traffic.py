"""What a rank sends and holds in a step of data-parallel training, as formulas.

    python benchmarks/traffic.py

prints the tables of docs/scaling.md. A test compares the formulas with bytes counted by the kernel.
"""

import math
from collections.abc import Callable

RANKS = (2, 4, 8, 16, 64, 256, 1024, 4096)


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that a rank sends to add up ``size`` bytes of every rank, in a ring."""
    return 2 * size * (ranks - 1) / ranks


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends so that all have ``size`` bytes, of which each rank has one share."""
    return size * (ranks - 1) / ranks


reduce_scatter: Callable[[float, int], float] = all_gather
"""The reverse of an all-gather: ``size`` bytes of every rank are added, and each gets one share."""

all_to_all: Callable[[float, int], float] = all_gather
"""Each rank keeps its own share of ``size`` bytes and sends the others to their ranks."""


def ddp_sent(grads: float, ranks: int) -> float:
    """Bytes sent in an update: gradients are all-reduced once, however many micro-batches there are."""
    return all_reduce(grads, ranks)


def exact_sent(grads: float, ranks: int) -> float:
    """Bytes sent in an update by ``tree_sum``: an all-to-all, and an all-gather of the sums."""
    return all_to_all(grads, ranks) + all_gather(grads, ranks)


def fsdp_sent(
    params: float,
    ranks: int,
    microbatches: int = 1,
    scatter: Callable[[float, int], float] = reduce_scatter,
) -> float:
    """Bytes sent in an update by FSDP2 with resharding after the forward pass.

    Parameters are gathered for every forward and every backward pass; gradients are scattered once, if
    accumulation keeps them whole (``set_requires_gradient_sync(False)``). Gloo has no reduce-scatter of its
    own and all-reduces instead: ``scatter=all_reduce``.
    """
    return microbatches * 2 * all_gather(params, ranks) + scatter(params, ranks)


def ddp_held(params: float) -> float:
    """Bytes of parameters, two moments, gradients and DDP's buckets; activations not counted."""
    return 5 * params


def pure_held(params: float, *, donated: bool = True) -> float:
    """Bytes of ``data_parallel``: parameters, two moments, gradients, and the buffer that travels.

    A step that is not donated makes new parameters and moments beside the old ones, when the buffer that
    the gradients were copied from is already free.
    """
    return (5 if donated else 7) * params


def exact_held(params: float, microbatches: int) -> float:
    """Bytes of ``data_parallel(exact=True)``, donated, with ``microbatches`` on each rank.

    Parameters and two moments, and the larger of: the sets of gradients that are open in the tree; and one
    set, the buffer that travels, and the one that is received.
    """
    return (3 + max(math.ceil(math.log2(microbatches)) + 1, 3)) * params


def fsdp_held(params: float, ranks: int, blocks: int) -> float:
    """Bytes of FSDP2: a share of everything, two blocks' parameters and one block's gradients whole."""
    return 4 * params / ranks + 3 * params / blocks


def ring_messages(ranks: int) -> int:
    """Messages one after the other in a ring all-reduce; also in ``tree_sum``, as a rank sends them."""
    return 2 * (ranks - 1)


def seconds(sent: float, messages: int, bandwidth: float, latency: float) -> float:
    """Time of an exchange that nothing overlaps: every message waits, every byte passes once."""
    return sent / bandwidth + messages * latency


def traffic_table(params: float) -> str:
    """Return what a rank sends and holds, as Markdown; ``params`` in bytes, 32 blocks."""
    lines = [
        "| ranks | DDP and exact, sent | FSDP2, sent | DDP, held | exact, held | FSDP2, held |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        assert ddp_sent(params, ranks) == exact_sent(params, ranks)
        cells = [
            ddp_sent(params, ranks),
            fsdp_sent(params, ranks),
            ddp_held(params),
            exact_held(params, 4),
            fsdp_held(params, ranks, 32),
        ]
        lines.append(f"| {ranks} | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def time_table(params: float, bandwidth: float, latency: float) -> str:
    """Return milliseconds of an exchange of gradients by bandwidth and by messages, as Markdown."""
    lines = ["| ranks | bytes, ms | messages | messages, ms | both, ms |", "|---|---|---|---|---|"]
    for ranks in RANKS:
        messages = ring_messages(ranks)
        sent = ddp_sent(params, ranks)
        times = [
            seconds(sent, 0, bandwidth, latency),
            seconds(0, messages, bandwidth, latency),
            seconds(sent, messages, bandwidth, latency),
        ]
        first, second, both = (f"{1e3 * time:.2f}" for time in times)
        lines.append(f"| {ranks} | {first} | {messages} | {second} | {both} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables for 10^9 parameters in float32."""
    print(traffic_table(4e9))
    print()
    print(time_table(4e9, bandwidth=50e9, latency=5e-6))


if __name__ == "__main__":
    main()
