"""Prefetching: same batches in the same order, on the device; nothing ahead of time elsewhere."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from trainer.data.prefetch import Prefetch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


def test_on_the_host_batches_come_as_they_are_and_none_is_fetched_ahead() -> None:
    fetched: list[int] = []

    def source() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(3):
            fetched.append(i)
            yield {"x": torch.tensor(i)}

    ahead = Prefetch(torch.device("cpu"))
    given = list(source())
    assert [a is b for a, b in zip(ahead(given), given, strict=True)] == [True] * 3
    fetched.clear()
    next(ahead(source()))
    assert fetched == [0]
    assert list(ahead([])) == []


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetch(torch.device("cpu"), depth=0)


def batch(i: int, size: int = 1 << 17) -> Any:
    x = torch.full((size,), i)
    return {"x": x.pin_memory(), "more": [Pair(x + 1, "text"), (x + 2,)]}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_arrive_in_order_on_the_device(depth: int, count: int) -> None:
    device = torch.device("cuda", 0)
    moved = list(Prefetch(device, depth)(batch(i) for i in range(count)))
    assert len(moved) == count
    for i, one in enumerate(moved):
        pair, (last,) = one["more"]
        tensors = [one["x"], pair.first, last]
        assert all(tensor.device == device for tensor in tensors)
        assert [tensor[0].item() for tensor in tensors] == [i, i + 1, i + 2]
        assert pair.second == "text"


@gpu
@pytest.mark.gpu
def test_large_tensors_are_pinned_first() -> None:
    given = [{"x": torch.full((1 << 18,), i), "y": torch.ones(4), "text": "a"} for i in range(3)]
    moved = list(Prefetch(torch.device("cuda"), pin=True)(given))
    assert [(one["x"].is_cuda, int(one["x"][-1]), one["text"]) for one in moved] == [
        (True, i, "a") for i in range(3)
    ]
    assert not any(one["x"].is_pinned() for one in given)  # whose batches these are keeps them
    two = [{"x": torch.ones(1 << 16), "y": torch.ones(1 << 14)}]
    (middle,) = Prefetch(torch.device("cuda"), pin=True)(two)
    assert (middle["x"].is_cuda, middle["x"].is_pinned(), middle["y"].is_pinned()) == (0, 1, 0)


@gpu
@pytest.mark.gpu
def test_small_batches_come_as_they_are() -> None:
    given = [batch(i, 4) for i in range(3)]
    moved = list(Prefetch(torch.device("cuda"))(given))
    assert all(one is other for one, other in zip(moved, given, strict=True))


@gpu
@pytest.mark.gpu
def test_no_more_than_the_depth_is_under_way() -> None:
    fetched: list[int] = []

    def source() -> Iterator[Any]:
        for i in range(6):
            fetched.append(i)
            yield batch(i)

    ahead = Prefetch(torch.device("cuda"), 2)(source())
    next(ahead)
    assert fetched == [0, 1, 2]
    next(ahead)
    assert fetched == [0, 1, 2, 3]


@gpu
@pytest.mark.gpu
def test_memory_is_not_used_again_before_the_work_on_it_is_done() -> None:
    """Each batch is dropped while a kernel that reads it still waits behind slow ones."""
    device, size = torch.device("cuda"), 1 << 20
    square = torch.randn(4096, 4096, device=device)
    sums = []
    for one in Prefetch(device)(batch(i, size) for i in range(20)):
        for _ in range(4):
            square = torch.mm(square, square).tanh()
        sums.append(one["x"].sum() + one["more"][1][0].sum())
        del one
    assert [int(total) for total in sums] == [size * (2 * i + 2) for i in range(20)]


@gpu
@pytest.mark.gpu
def test_copies_do_not_wait_for_the_kernels_that_are_queued() -> None:
    device = torch.device("cuda")
    ahead, square = Prefetch(device), torch.randn(8192, 8192, device=device)
    list(ahead([batch(0)]))  # the first copy sets things up
    torch.cuda.synchronize()
    for _ in range(20):
        square = torch.mm(square, square).tanh()
    kernels = torch.cuda.current_stream().record_event()
    moved, copied = ahead._start(batch(1, 1 << 20), ahead._side)  # type: ignore[arg-type]
    copied.synchronize()
    assert not kernels.query()
    assert int(ahead._finish(moved, copied)["x"][0]) == 1
