"""``Trainer.profile`` and ``ProfilerCallback``: what some steps in the middle of a training do."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from attrs import frozen
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.callbacks import TrainerCallback

logger = logging.getLogger(__name__)

TRACE, TABLE = "trace.json", "table.txt"
ROWS = 20
"""Operations in the table."""
_MARK = "training step "
_SHOWN = 8  # lines of the table in the log


class ProfilerCallback(TrainerCallback):
    """Records ``steps`` steps with ``torch.profiler``, after ``wait`` steps, once per training.

    It writes ``trace.json``, to be opened in https://ui.perfetto.dev or chrome://tracing, and
    ``table.txt``: time per step, how much of it the GPU is idle, and the operations that take longest.
    The steps are marked in the trace. What lies between two steps belongs to the recording, so fetching
    data and, where they are due, logs and evaluations are seen. Recording makes steps slower; those
    before and after are as ever.

    With several processes only the first records. If the training is over earlier, what there is is
    written, with a warning; if an error ends it, nothing is.

    Args:
        steps: how many to record.
        wait: how many to leave out before, so that compilers and caches are warm.
        folder: where to write; None takes ``profile`` in the output folder.

    Raises:
        ValueError: if ``steps`` is less than 1 or ``wait`` less than 0.
    """

    def __init__(self, steps: int = 10, wait: int = 10, folder: str | Path | None = None) -> None:
        if steps < 1 or wait < 0:
            raise ValueError(
                f"profile: steps must be at least 1 and wait at least 0, got steps={steps}, wait={wait}"
            )
        self.steps, self.wait = steps, wait
        self.folder = None if folder is None else Path(folder)
        self._handler: Any = None
        self._seen = 0
        self._over = True
        self._recording: _Recording | None = None

    def once(self, handler: Any) -> None:
        """Join the callbacks of a handler for one training, in place of what ``once`` added before."""
        for callback in list(handler.callbacks):
            if isinstance(callback, ProfilerCallback) and callback._handler is handler:
                callback.close()
        handler.callbacks.append(self)
        self._handler = handler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start waiting; a recording that an attempt with another batch size left is dropped."""
        self._drop()
        self._seen, self._over = 0, args.process_index != 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the step, and begin to record if there is nothing to wait for."""
        if self._recording is None and not self._over and self._seen >= self.wait:
            self._recording = _Recording(args.device)
        if self._recording is not None:
            self._recording.begin_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to record after the last step to wait for, and end after the last to record."""
        if self._over:
            return
        self._seen += 1
        if self._recording is not None:
            self._recording.end_step()
            if self._recording.steps == self.steps:
                self._finish(args)
        elif self._seen == self.wait and state.global_step < state.max_steps:
            self._recording = _Recording(args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what there is of a recording that has not come to its end."""
        if not self._over:
            self._end_early(args)
        self.close()

    def close(self) -> None:
        """Drop what is being recorded; called when an error ends the training."""
        self._drop()
        self._over = True
        handler, self._handler = self._handler, None
        if handler is not None and self in handler.callbacks:
            handler.callbacks.remove(self)

    def _end_early(self, args: Any) -> None:
        if self._recording is None or not self._recording.steps:
            logger.warning(
                "Nothing was profiled: the training ended after %d steps, and profiling waits for %d. "
                "Give a smaller wait.",
                self._seen,
                self.wait,
            )
        else:
            logger.warning(
                "The training ended after %d of the %d steps to profile.",
                self._recording.steps,
                self.steps,
            )
            self._finish(args)

    def _drop(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()

    def _finish(self, args: Any) -> None:
        recording, self._recording = self._recording, None
        assert recording is not None
        recording.stop()
        folder = self.folder or Path(args.output_dir) / "profile"
        try:
            text = recording.write(folder)
        except OSError as error:
            logger.warning("The profile was not written, training goes on: %s", error)
        else:
            lines = text.splitlines()[:_SHOWN]
            logger.info("Profile in %s (%s, %s):\n%s", folder, TRACE, TABLE, "\n".join(lines))
        self.close()


class _Recording:
    """A recording in progress, from its construction to ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU]
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
        self._mark: AbstractContextManager[Any] | None = None
        self._profiler = profile(activities=activities, acc_events=True)
        self.steps = 0
        self.seconds = 0.0
        self._synchronize()
        self._profiler.start()
        self._began = perf_counter()

    def begin_step(self, number: int) -> None:
        """Mark where a step begins."""
        self._mark = record_function(f"{_MARK}{number}")
        self._mark.__enter__()

    def end_step(self) -> None:
        """Mark where it ends. The time of the steps is up to the end of the last one."""
        self._unmark()
        self.steps += 1

    def stop(self) -> None:
        """End the recording."""
        self._unmark()
        self._synchronize()
        self.seconds = perf_counter() - self._began
        self._profiler.stop()

    def write(self, folder: Path) -> str:
        """Write the trace and the table; returns the table.

        Raises:
            OSError: if that fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = self.table()
        (folder / TABLE).write_text(text, encoding="utf-8")
        self._profiler.export_chrome_trace(str(folder / TRACE))
        return text

    def table(self) -> str:
        """Return time per step, the share in which the GPU is idle, and the longest operations."""
        lines = [
            f"{self.steps} steps, {self.seconds / self.steps * 1e3:.3f} ms a step while recording"
        ]
        if self._cuda:
            busy = _union(_device_intervals(self._profiler.events() or [])) / 1e6
            idle = max(1 - busy / self.seconds, 0.0)
            lines.append(f"The GPU is idle for {idle:.1%} of that.")
        return "\n".join([*lines, "", *_rows(_operations(self._profiler, self._cuda), self.steps)])

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


@frozen
class _Operation:
    """All calls of one operation; ``own`` is the time in it but not in what it calls, microseconds."""

    name: str
    calls: int
    own: float


def _operations(profiler: Any, cuda: bool) -> list[_Operation]:
    """Return what took time: kernels and copies where there is a GPU, PyTorch's operations elsewhere.

    What launches kernels has their time once more, and has none of those that come from CUDA graphs.
    """
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    return [
        _Operation(event.key, event.count, float(getattr(event, name)))
        for event in profiler.key_averages()
        if (_is_device_work(event) if cuda else True) and not event.key.startswith(_MARK)
    ]


def _rows(operations: Iterable[_Operation], steps: int) -> list[str]:
    """Return the lines of the table: the longest operations, each with time, share and calls per step."""
    found = sorted(operations, key=lambda op: op.own, reverse=True)
    total = sum(op.own for op in found) or 1.0
    lines = [f"{'ms a step':>10} {'share':>7} {'calls a step':>13}  operation"]
    for op in found[:ROWS]:
        lines.append(
            f"{op.own / steps / 1e3:>10.3f} {op.own / total:>7.1%} {op.calls / steps:>13.1f}  "
            f"{op.name[:100]}"
        )
    return lines


def _device_intervals(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Return when the GPU did something: begin and end of kernels and copies, in microseconds."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if _is_device_work(event) and not event.key.startswith(_MARK)
    ]


def _is_device_work(event: Any) -> bool:
    # Ranges marked on the host are there a second time, drawn over the kernels that they launched.
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return covered
