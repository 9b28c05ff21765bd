"""CUDA graphs: what a function launches, recorded once and replayed with fresh seeds.

A function goes through three stages. It runs as it is; it is rehearsed, which runs it while everything
that a recording could not hold is an error; it is recorded. Rehearsing finds what is wrong while nothing is
at stake: a recording that fails half-way would leave the device's generators unusable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define

from trainstep.errors import CaptureError
from trainstep.rehearsal import Fn, where
from trainstep.rng import Key, SlotKey

is_recording = torch.cuda.is_current_stream_capturing
"""Whether the current stream is being recorded; PyTorch's own name says no while ``record`` is at it."""


@define(eq=False)
class Recording:
    """A recorded function.

    Attributes:
        graph: the CUDA graph.
        outputs: what the function returned: tensors that every replay fills anew.
        slots: the generators that it draws from, each with the path of its key.
    """

    graph: Any
    outputs: Any
    slots: list[tuple[tuple[int, ...], torch.Generator]]
    _fresh: bool = True

    def replay(self, root: Key) -> Any:
        """Run again, drawing from keys that derive from ``root``; returns the outputs."""
        for path, slot in self.slots:
            slot.manual_seed(root.fold_in(*path).bits)
        self.graph.replay()
        if self._fresh:  # the first time shows which slots are drawn from at all
            self.slots = [(path, slot) for path, slot in self.slots if slot.get_offset()]
            self._fresh = False
        return self.outputs


def record(
    fn: Fn, paths: list[tuple[int, ...]], device: torch.device, pool: Any = None
) -> Recording:
    """Record what ``fn`` launches. Nothing is run; ``replay`` does that.

    Args:
        fn: as rehearsed. It must read and write tensors that stay.
        paths: the keys that it draws from, in order.
        device: a CUDA device.
        pool: the memory pool to share with other recordings that are replayed in turn.

    Raises:
        CaptureError: if PyTorch cannot record what it does.
    """
    graph = torch.cuda.CUDAGraph()
    slots = [(path, torch.Generator(device)) for path in paths]
    waiting = iter(slots)

    def take(path: tuple[int, ...]) -> torch.Generator:
        expected, slot = next(waiting, (None, None))
        if slot is None or expected != path:
            raise CaptureError("the step draws from other keys than it did one call before")
        return slot

    for _, slot in slots:
        graph.register_generator_state(slot)
    failure: Exception | None = None
    index = torch.cuda.current_device() if device.index is None else device.index
    default = torch.cuda.default_generators[index]
    kept = default.graphsafe_get_state()
    # A recording that fails leaves its generators unusable; so it gets one that nobody else needs.
    default.graphsafe_set_state(torch.Generator(device))
    try:
        # Other threads (of loaders, of checkpoints) may go on using the device.
        mode = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        with torch.cuda.device(index), mode, _unseen():
            try:
                outputs = fn(SlotKey(take))
            except Exception as error:
                failure = error
    except Exception as error:
        failure = failure or error
    finally:
        default.graphsafe_set_state(kept)
    if failure is not None:
        raise CaptureError(
            f"the step cannot be recorded{where(failure)}: {failure}. Do not capture it."
        ) from failure
    # PyTorch writes initial seeds on the stream of the recording, for which a replay on another does not
    # wait: on a busy device they could come after the seeds of the first replay.
    torch.cuda.synchronize(device)
    return Recording(graph, outputs, slots)


@contextmanager
def _unseen() -> Iterator[None]:
    """Hide from Python that the stream is being recorded, so that what was rehearsed is recorded.

    Models of transformers build other masks when they see it, and take other kernels for them.
    """
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = is_recording
