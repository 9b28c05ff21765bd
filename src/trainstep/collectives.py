"""Sums, means and copies over the ranks of a process group, as pure functions of pytrees.

Every function takes the same tree (same leaves, shapes and dtypes, in the same order) on every rank, and
returns new tensors. Tensors of one dtype and device travel together in one buffer, so a call is one
collective for each kind of tensor, and nothing waits for the device. Numbers become zero-dimensional
tensors: int64, or float64.

``group`` is a ``torch.distributed`` process group or a ``DeviceMesh`` of one dimension; None is the default
group. Without one, or with one rank, nothing is exchanged: code runs unchanged on a single process.
No function here is differentiable: sum gradients, not losses.

A tree that differs between ranks is not noticed while tensors travel: results would be wrong, or the call
would wait for ever. ``same_structure`` finds out, once, before training.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainstep import tree as pytree
from trainstep.packing import exchange
from trainstep.ranks import Group, at_once, check_power_of_two, gather, resolve, shared, wait
from trainstep.ranks import rank as rank
from trainstep.ranks import size as size
from trainstep.shares import joined, parts
from trainstep.sums import Sums


def psum(tree: Any, group: Group = None) -> Any:
    """Add up the trees of all ranks, in an order that the backend chooses.

    Args:
        tree: a pytree of tensors and numbers, or ``Sums``. Booleans are counted, as int64; None stays.
        group: see the module.

    Returns:
        The tree of sums, the same on every rank. Of ``Sums``: grads, total, weight and aux are added up, in
        units of 1; buffers and the loss scale are this rank's; a number as weight becomes a tensor.

    Raises:
        TypeError: for leaves that cannot be added.
        ValueError: for a mesh of several dimensions, a group without this process, and tensors that
            require a gradient.
    """
    if isinstance(tree, Sums):
        return joined(tree, psum(parts(tree, paired=True), group))
    channel = resolve("psum", group)

    def add(flat: Tensor) -> Callable[[], Tensor]:
        return _all_reduced(flat, channel)

    return exchange("psum", tree, channel, add, summed=True)


def pmean(tree: Any, group: Group = None) -> Any:
    """Return ``psum(tree, group)`` divided by the number of ranks; integers become float32.

    This is the mean over ranks, not over samples. Where ranks hold different numbers of samples, carry sums
    and weights, and divide once: ``psum(sums).mean()``.

    Raises:
        TypeError, ValueError: as ``psum``; also for ``Sums``, whose mean is over their weight.
    """
    if isinstance(tree, Sums):
        raise TypeError("pmean: Sums carry their own weight; use psum(sums).mean()")
    channel = resolve("pmean", group)
    ranks = size(group)

    def average(flat: Tensor) -> Callable[[], Tensor]:
        finish = _all_reduced(flat, channel)
        return lambda: finish() / ranks

    return exchange("pmean", tree, channel, average, summed=True)


def tree_sum(tree: Any, group: Group = None) -> Any:
    """Add up the trees of all ranks in the fixed binary tree of ``trainstep.sums.add_in_tree``.

    Rank ``r`` of ``w`` contributes the sum over micro-batches ``r, r + w, r + 2 w, ...``, itself added in
    the tree (``sum_gradients(..., order="tree", positions=range(r, n, w))``). The result then has the
    bits that one process gets from all ``n``, whatever ``w``.

    Every rank adds up one part of the numbers for all, after an all-to-all, and an all-gather distributes
    the sums. So a rank sends ``2 (w - 1) / w`` times the size of the tree, as a ring all-reduce does.

    Args:
        tree: as for ``psum``; ``Sums`` must be in units of 1, as ``order="tree"`` makes them.
        group: see the module; its size must be a power of two.

    Raises:
        TypeError: for leaves that cannot be added.
        ValueError: as ``psum``; also for another number of ranks, and for other units.
    """
    if isinstance(tree, Sums):
        if tree.unit != 1:
            raise ValueError(
                f"tree_sum: the sums are in units of {tree.unit}, and ranks would round differently; "
                'make them with order="tree", which uses 1'
            )
        return joined(tree, tree_sum(parts(tree), group))
    channel = resolve("tree_sum", group)
    ranks = size(group)
    check_power_of_two("tree_sum", ranks)

    def add(flat: Tensor) -> Callable[[], Tensor]:
        if not shared(channel):
            return lambda: flat
        received = torch.empty_like(flat)
        work = dist.all_to_all_single(received, flat, group=channel, async_op=at_once())

        def finish() -> Tensor:
            wait(work)
            rows = received.view(ranks, -1)  # row r: what rank r has to say on this rank's part
            while len(rows) > 1:
                # Rows r and r + half differ in the highest bit of r, the last that the tree splits by.
                half = len(rows) // 2
                rows = rows[:half].add_(rows[half:])
            gather(flat, rows[0], channel)
            return flat

        return finish

    return exchange("tree_sum", tree, channel, add, summed=True, multiple=ranks)


def all_gather(tree: Any, group: Group = None, axis: int = 0, *, tiled: bool = False) -> Any:
    """Collect every rank's tree on every rank, in the order of ranks.

    Args:
        tree: a pytree of tensors and numbers; shapes are the same on all ranks.
        group: see the module.
        axis: where the ranks are counted, in the result.
        tiled: join tensors along the existing ``axis``, rather than stack them along a new one.

    Raises:
        TypeError: for leaves that are neither tensors nor numbers.
        ValueError: as ``psum``; also for an axis that a tensor does not have.
    """
    channel = resolve("all_gather", group)
    ranks = size(group)

    def collect(flat: Tensor) -> Callable[[], Tensor]:
        if not shared(channel):
            return lambda: flat[None]
        result = flat.new_empty(ranks * len(flat))
        gather(result, flat, channel)
        return lambda: result.view(ranks, -1)

    def place(stacked: Any) -> Any:
        if not isinstance(stacked, Tensor):
            return stacked
        axes = stacked.ndim - 1 if tiled else stacked.ndim
        if not -axes <= axis < axes:
            raise ValueError(
                f"all_gather(axis={axis}, tiled={tiled}): a tensor of shape {tuple(stacked.shape[1:])} "
                f"gives a result with {axes} axes; choose one of them"
            )
        where = axis % axes
        moved = stacked.movedim(0, where)
        return (moved.flatten(where, where + 1) if tiled else moved).contiguous()

    return pytree.map(place, exchange("all_gather", tree, channel, collect))


def broadcast(tree: Any, group: Group = None, src: int = 0) -> Any:
    """Return the tree of rank ``src`` (counted in the group) on every rank.

    Only tensors travel; numbers, keys and other leaves stay this rank's. A ``TrainState`` is such a tree.

    Raises:
        ValueError: as ``psum``; also for a rank that the group does not have.
    """
    channel = resolve("broadcast", group)
    if not 0 <= src < size(group):
        raise ValueError(f"broadcast: src={src} is no rank of a group of {size(group)}")

    def send(flat: Tensor) -> Callable[[], Tensor]:
        if shared(channel):
            dist.broadcast(flat, group_src=src, group=channel)
        return lambda: flat

    leaves, spec = pytree.flatten(tree)
    tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
    sent = exchange("broadcast", tensors, channel, send)
    return pytree.unflatten(
        [leaf if new is None else new for leaf, new in zip(leaves, sent, strict=True)], spec
    )


def same_structure(tree: Any, group: Group = None) -> None:
    """Make sure that every rank holds the same leaves: paths, dtypes and shapes, in the same order.

    Waits for all ranks and for the device; for the start of a training, not for every step.

    Raises:
        ValueError: on every rank, with the first difference, if they do not.
    """
    channel = resolve("same_structure", group)
    if not shared(channel):
        return
    content = parts(tree) if isinstance(tree, Sums) else tree
    mine = [(path, _kind(leaf)) for path, leaf in pytree.leaves_with_paths(content)]
    everyones: list[Any] = [None] * size(group)
    dist.all_gather_object(everyones, mine, group=channel)
    for number, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise ValueError(
                f"same_structure: ranks 0 and {number} hold different trees: "
                f"{_difference(dict(everyones[0]), dict(theirs), number)}. Collectives need the same "
                "leaves in the same order on every rank."
            )


def _all_reduced(flat: Tensor, channel: Any) -> Callable[[], Tensor]:
    work = None
    if shared(channel):
        work = dist.all_reduce(flat, group=channel, async_op=at_once())

    def finish() -> Tensor:
        wait(work)
        return flat

    return finish


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__


def _difference(first: dict[str, Any], other: dict[str, Any], number: int) -> str:
    for path in (*first, *other):
        mine, theirs = first.get(path, "missing"), other.get(path, "missing")
        if mine != theirs:
            return f"{path or 'the leaf'} is {mine} on rank 0 and {theirs} on rank {number}"
    return f"their leaves are in another order: {', '.join(first)} and {', '.join(other)}"
