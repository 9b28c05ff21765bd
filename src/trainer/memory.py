"""Memory used by the stages of a run, and the device's cache."""

import gc
import threading
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
from attrs import define, field

STAGES = ("init", "train", "eval", "test")
SAMPLING_INTERVAL = 0.01
"""Seconds between two looks at the process's resident memory."""


class MemoryTracker:
    """Measures how much memory each stage takes, on the host and on the device.

    ``start`` begins a stage; a stage within another belongs to the outer one and reports nothing. With
    ``skip``, or where psutil is not installed, nothing is measured and all reports are empty.

    Args:
        skip: measure nothing.
        device: where the model is. Backends without memory statistics (the CPU, Apple's MPS) have no
            device figures.
    """

    def __init__(self, skip: bool = False, device: torch.device | str = "cpu") -> None:
        self._process = None if skip else _this_process()
        self._device = torch.device(device)
        self._running: Stage | None = None
        self._init: dict[str, int] = {}

    def start(self, name: str) -> "Stage":
        """Begin a stage: one of ``init``, ``train``, ``eval`` and ``test``.

        Returns:
            The stage, to be ended with ``stop()`` or by using it in a ``with`` statement.

        Raises:
            ValueError: for another name.
        """
        if name not in STAGES:
            raise ValueError(f"no memory stage {name!r}; choose one of {', '.join(STAGES)}")
        stage = Stage(self, name)
        if self._process is not None and self._running is None:
            self._running = stage
            stage._begin(self._process, self._device)
        return stage

    def abandon(self) -> None:
        """End the stage in progress, if there is one, without a report: an error has ended its work."""
        if self._running is not None:
            self._running.stop()

    def _finish(self, stage: "Stage", measured: dict[str, int]) -> dict[str, int]:
        """Keep what ``init`` measured for the first other stage that reports."""
        self._running = None
        if stage.name == "init":
            self._init = measured | {f"before_{key}": n for key, n in stage._before.items()}
            return {}
        held, self._init = self._init, {}
        return held | measured


@define(eq=False)
class Stage:
    """A stretch of a run whose memory is measured; made by ``MemoryTracker.start``."""

    _tracker: MemoryTracker
    name: str
    _sampler: "_PeakSampler | None" = field(default=None, init=False)
    _memory: Any = field(default=None, init=False)
    _device: torch.device | None = field(default=None, init=False)
    _before: dict[str, int] = field(factory=dict, init=False)

    def stop(self) -> dict[str, int]:
        """End the stage; a second time does nothing.

        Returns:
            Bytes under ``<stage>_mem_cpu_alloc_delta`` (held at the end beyond what was held at the
            beginning; may be negative), ``<stage>_mem_cpu_peaked_delta`` (at the most beyond what was
            held at the end; never negative), and likewise ``gpu`` where there is one. The first report
            also has those of ``init`` and what was held before it, ``before_init_mem_cpu`` and
            ``before_init_mem_gpu``. Empty for ``init``, within another stage, and without measuring.
        """
        if self._sampler is None:
            return {}
        sampler, self._sampler = self._sampler, None
        gc.collect()
        held, peak = sampler.stop()
        found = {"cpu": (held, peak)}
        if self._memory is not None:
            allocated = self._memory.memory_allocated(self._device)
            found["gpu"] = (allocated, self._memory.max_memory_allocated(self._device))
        measured: dict[str, int] = {}
        for place, (end, top) in found.items():
            key = f"{self.name}_mem_{place}"
            measured[f"{key}_alloc_delta"] = end - self._before[key]
            measured[f"{key}_peaked_delta"] = top - end
        return self._tracker._finish(self, measured)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _begin(self, process: Any, device: torch.device) -> None:
        gc.collect()
        module = torch.get_device_module(device.type)
        if hasattr(module, "max_memory_allocated"):
            self._memory, self._device = module, device
            module.init()  # statistics cannot be reset before
            module.reset_peak_memory_stats(device)
            self._before[f"{self.name}_mem_gpu"] = module.memory_allocated(device)
        self._sampler = _PeakSampler(process)
        self._before[f"{self.name}_mem_cpu"] = self._sampler.first


class _PeakSampler:
    """A thread that looks at the resident memory now and then, and sleeps in between."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.first = self._peak = _resident(process)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        """End the thread; returns what is held now and the most that was seen."""
        self._done.set()
        self._thread.join()
        held = _resident(self._process)
        return held, max(self._peak, held)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_INTERVAL):
            self._peak = max(self._peak, _resident(self._process))


def empty_cache(device: torch.device | str) -> None:
    """Give the memory that a device's allocator keeps but does not use back to the device."""
    module = torch.get_device_module(torch.device(device).type)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def _this_process() -> Any:
    try:
        return import_module("psutil").Process()
    except ImportError:
        return None


def _resident(process: Any) -> int:
    return process.memory_info().rss
