"""Where the first infinity or NaN of a forward pass comes from: ``debug="underflow_overflow"``."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer import modeling


@frozen
class Range:
    """The smallest and the largest absolute value of a tensor; both are NaN if any value is."""

    name: str
    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether the tensor holds neither an infinity nor a NaN."""
        return self.high < float("inf")

    def __str__(self) -> str:
        return f"    {self.low:8.2e} {self.high:8.2e}  {self.name}"


@frozen
class Frame:
    """One call of one module: the ranges of its own weights, its inputs and its outputs."""

    module: str
    ranges: list[Range]

    def __str__(self) -> str:
        return "\n".join([f"  {self.module}", *map(str, self.ranges)])


class DebugUnderflowOverflow:
    """Looks at every module's weights, inputs and outputs, and stops at the first that are not finite.

    Frames come in the order in which modules return, so a block comes after its parts. Every frame
    waits for the device; this is for finding a fault and not for everyday training.

    Args:
        model: whose modules are watched; PyTorch's wrappers are looked through.
        max_frames_to_save: frames to keep, and to show when something is found.
        trace_batch_nums: forward passes, counted from 0, of which every frame is printed.
        abort_after_batch_num: the forward pass after which to stop, to look at what was printed.

    Raises:
        ValueError: in the forward pass, with the frames, when a value is infinite or NaN, or after
            the pass ``abort_after_batch_num``.
    """

    def __init__(
        self,
        model: nn.Module,
        max_frames_to_save: int = 21,
        trace_batch_nums: Iterable[int] | None = None,
        abort_after_batch_num: int | None = None,
    ) -> None:
        self.frames: deque[Frame] = deque(maxlen=max_frames_to_save)
        self.batch_number = -1
        self._traced = frozenset(trace_batch_nums or ())
        self._last = abort_after_batch_num
        self._root = modeling.unwrap(model)
        self._names = {module: name for name, module in self._root.named_modules()}
        self._hooks: list[RemovableHandle] = [
            self._root.register_forward_pre_hook(self._begin),
            *(m.register_forward_hook(self._look, with_kwargs=True) for m in self._names),
        ]

    def detach(self) -> None:
        """Stop watching; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> "DebugUnderflowOverflow":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.batch_number += 1

    def _look(self, module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        name = f"{self._names[module] or 'the model'} ({type(module).__name__})"
        weights = dict(module.named_parameters(recurse=False))
        tensors = [
            *_tensors(weights, ""),
            *_tensors({f"input {i}": value for i, value in enumerate(inputs)}, ""),
            *_tensors({f"input {key}": value for key, value in options.items()}, ""),
            *_tensors(output, "output"),
        ]
        frame = Frame(name, [_range(place, tensor) for place, tensor in tensors])
        self.frames.append(frame)
        if self.batch_number in self._traced:
            print(f"forward pass {self.batch_number}\n{frame}")
        bad = [part.name for part in frame.ranges if not part.finite]
        if bad:
            raise ValueError(self._message(name, bad))
        if module is self._root and self.batch_number == self._last:
            raise ValueError(
                f"stopped after forward pass {self.batch_number}, as abort_after_batch_num asks"
            )

    def _message(self, name: str, bad: list[str]) -> str:
        shown = "\n".join(map(str, self.frames))
        return (
            f"infinity or NaN in forward pass {self.batch_number}, in {name}: {', '.join(bad)}.\n"
            f"The last {len(self.frames)} modules that returned, the newest at the end, with the "
            f"smallest and largest absolute values of their weights, inputs and outputs:\n{shown}"
        )


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of real or complex numbers in a nested value, with their places."""
    if isinstance(value, Tensor):
        if value.numel() and (value.is_floating_point() or value.is_complex()):
            yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{name}[{number}]")


def _range(name: str, tensor: Tensor) -> Range:
    return Range(name, *torch.stack(tensor.abs().aminmax()).cpu().tolist())
