"""Whether a function could be recorded: it runs while all that a recording cannot hold is an error."""

import contextlib
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainstep.errors import CaptureError
from trainstep.rng import Key, SlotKey

Fn = Callable[[Any], Any]
"""Takes the key that it draws from, and returns a pytree of tensors."""

DRAWN_ON_HOST = (
    "random numbers are drawn on the CPU, where a recorded step would never draw again. Draw them on the "
    "GPU, or do not capture the step."
)
_COMPILER = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")
_OURS = (torch.__path__[0], __file__.removesuffix("rehearsal.py"))


def rehearse(fn: Fn, root: Key, device: torch.device) -> tuple[Any, list[tuple[int, ...]]]:
    """Run ``fn`` on the current stream, and find out whether it could be recorded.

    Returns:
        What ``fn`` returns, with the bits of ``fn(root)``, and the paths of the keys that it drew from.

    Raises:
        CaptureError: if it waits for the device, or draws random numbers on the host.
    """
    slots: list[tuple[tuple[int, ...], torch.Generator]] = []

    def take(path: tuple[int, ...]) -> torch.Generator:
        slots.append((path, torch.Generator(device).manual_seed(root.fold_in(*path).bits)))
        return slots[-1][1]

    with _host_randomness_kept() as drawn, generators_watched(torch.cuda) as copied:
        try:
            with _no_syncs():
                outputs = fn(SlotKey(take))
        except CaptureError:
            raise
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            operation = _failing_operation(lambda: fn(SlotKey(take)))
            raise CaptureError(
                f"{operation} waits for the GPU{where(error)}, so the step cannot be recorded. Keep the "
                "value on the GPU (torch.where instead of if, no .item()), or shapes fixed; or do not "
                "capture the step."
            ) from error
        if drawn():
            raise CaptureError(DRAWN_ON_HOST)
    if copied() and any(slot.get_offset() for _, slot in slots):
        raise CaptureError(
            "the state of the GPU's generator is copied and put back, as gradient checkpointing does to "
            "draw the same dropout twice; a recording would draw another one. Use no dropout where "
            "layers run again, or do not capture the step."
        )
    return outputs, [path for path, _ in slots]


def where(error: BaseException) -> str:
    """Say which line of the caller's code an error comes from: the innermost outside of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        ours = frame.filename.startswith(_OURS) or frame.name == "__torch_function__"
        if not ours and not frame.filename.startswith("<"):
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


@contextmanager
def _no_syncs() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # it warns that it does not find every operation
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _host_randomness_kept() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether the host's generators have moved; put them back at the end."""
    python, cpu = random.getstate(), torch.default_generator.get_state()
    numpy = np.random.get_state(legacy=True)  # noqa: NPY002 (the one that user code draws from)

    def moved() -> bool:
        now: Any = np.random.get_state(legacy=True)  # noqa: NPY002
        before: Any = numpy
        return not (
            random.getstate() == python
            and torch.equal(torch.default_generator.get_state(), cpu)
            and np.array_equal(now[1], before[1])
            and now[2:] == before[2:]
        )

    try:
        yield moved
    finally:
        random.setstate(python)
        torch.default_generator.set_state(cpu)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def generators_watched(module: Any) -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether somebody has asked for the state of a global generator.

    PyTorch's compiler does, which may compile something anew inside, and does not count.

    Args:
        module: whose ``get_rng_state`` is watched: ``torch`` or ``torch.cuda``.
    """
    original, asked = module.get_rng_state, []

    def get_rng_state(*args: Any, **kwargs: Any) -> Any:
        if not _compiling():
            asked.append(True)
        return original(*args, **kwargs)

    module.get_rng_state = get_rng_state
    try:
        yield lambda: bool(asked)
    finally:
        module.get_rng_state = original


def _compiling() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") in _COMPILER:
            return True
        frame = frame.f_back
    return False


class _Failing(TorchDispatchMode):
    """Remembers the first operation that fails."""

    name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            self.name = self.name or str(func)
            raise


def _failing_operation(fn: Callable[[], Any]) -> str:
    """Run what has failed once more, to learn at which operation it fails."""
    watcher = _Failing()
    with contextlib.suppress(Exception), _no_syncs(), watcher:
        fn()
    return watcher.name or "an operation"
