"""Memory of stages: keys, meaning, nesting, and a sampler that sleeps."""

import logging
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import memory
from trainer.memory import MemoryTracker, empty_cache

MIB = 1 << 20

CPU = ["mem_cpu_alloc_delta", "mem_cpu_peaked_delta"]


class Host:
    """A process whose resident memory is told by the test."""

    def __init__(self) -> None:
        self.held = 100
        self.looks = 0

    def memory_info(self) -> Any:
        self.looks += 1
        return SimpleNamespace(rss=self.held)

    def reach(self, held: int) -> None:
        """Hold this much until the sampler has certainly seen it."""
        self.held = held
        seen = self.looks
        while self.looks < seen + 2:
            time.sleep(0.001)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    process = Host()
    monkeypatch.setattr(memory, "_this_process", lambda: process)
    return process


@pytest.mark.row(108)
def test_alloc_and_peak(host: Host) -> None:
    with MemoryTracker().start("train") as stage:
        host.reach(180)
        host.held = 130
        assert stage.stop() == {"train_mem_cpu_alloc_delta": 30, "train_mem_cpu_peaked_delta": 50}
        assert stage.stop() == {}


@pytest.mark.row(109)
def test_alloc_may_be_negative_and_peaked_never_is(host: Host) -> None:
    stage = MemoryTracker().start("eval")
    host.held = 60
    found = stage.stop()
    assert found["eval_mem_cpu_alloc_delta"] == -40
    assert found["eval_mem_cpu_peaked_delta"] == 40  # 100 at the beginning, 60 at the end
    stage = MemoryTracker().start("eval")
    host.held = 90
    assert stage.stop() == {"eval_mem_cpu_alloc_delta": 30, "eval_mem_cpu_peaked_delta": 0}


@pytest.mark.row(110)
def test_init_is_reported_once_with_the_first_other_stage(host: Host) -> None:
    tracker = MemoryTracker()
    with tracker.start("init"):
        host.held = 107
    first = tracker.start("train").stop()
    assert first == {
        "init_mem_cpu_alloc_delta": 7,
        "init_mem_cpu_peaked_delta": 0,
        "before_init_mem_cpu": 100,
        "train_mem_cpu_alloc_delta": 0,
        "train_mem_cpu_peaked_delta": 0,
    }
    assert list(tracker.start("eval").stop()) == [f"eval_{key}" for key in CPU]


@pytest.mark.row(108)
def test_a_stage_within_another_belongs_to_it(host: Host) -> None:
    tracker = MemoryTracker()
    with tracker.start("train") as outer:
        for name in ("eval", "train"):
            with tracker.start(name) as inner:
                host.held += 10
                assert inner.stop() == {}
        assert outer.stop()["train_mem_cpu_alloc_delta"] == 20
    assert list(tracker.start("test").stop()) == [f"test_{key}" for key in CPU]


def test_an_error_ends_the_stage_and_its_thread(host: Host) -> None:
    tracker = MemoryTracker()

    def fail() -> None:
        with tracker.start("train"):
            assert sampler_is_running()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not sampler_is_running()
    assert tracker.start("eval").stop()


def sampler_is_running() -> bool:
    return any(thread.name == "memory-sampler" for thread in threading.enumerate())


def test_the_sampler_sleeps(host: Host) -> None:
    """A loop that spins would look tens of thousands of times."""
    before = host.looks
    with MemoryTracker().start("train"):
        time.sleep(0.2)
    assert 3 <= host.looks - before <= 0.2 / memory.SAMPLING_INTERVAL + 5


@pytest.mark.row(108)
@pytest.mark.parametrize("reason", ["skip", "psutil"])
def test_nothing_is_measured(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)  # importing it raises ImportError
    with caplog.at_level(logging.DEBUG):
        tracker = MemoryTracker(skip=reason == "skip")
        with tracker.start("init"), tracker.start("train") as stage:
            assert not sampler_is_running()
            assert stage.stop() == {}
    assert not caplog.messages


def test_unknown_stages(host: Host) -> None:
    for tracker in (MemoryTracker(), MemoryTracker(skip=True)):
        with pytest.raises(ValueError, match="'predict'; choose one of init, train, eval, test"):
            tracker.start("predict")


def test_real_memory() -> None:
    pytest.importorskip("psutil")
    with MemoryTracker().start("train") as stage:
        kept = torch.ones(24 * MIB, dtype=torch.uint8)
        passing = torch.ones(48 * MIB, dtype=torch.uint8)
        time.sleep(4 * memory.SAMPLING_INTERVAL)
        del passing
        found = stage.stop()
    assert 20 * MIB < found["train_mem_cpu_alloc_delta"] < 40 * MIB
    assert 40 * MIB < found["train_mem_cpu_peaked_delta"] < 64 * MIB
    assert kept[0] == 1


class Backend:
    """Memory statistics as ``torch.cuda`` has them."""

    def __init__(self) -> None:
        self.allocated = 1000
        self.top = 9999
        self.calls: list[str] = []

    def init(self) -> None:
        self.calls.append("init")

    def reset_peak_memory_stats(self, device: Any) -> None:
        assert device == torch.device("cuda", 1)
        self.calls.append("reset")
        self.top = self.allocated

    def memory_allocated(self, device: Any) -> int:
        return self.allocated

    def max_memory_allocated(self, device: Any) -> int:
        return self.top

    def empty_cache(self) -> None:
        self.calls.append("empty")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend()
    real = torch.get_device_module
    monkeypatch.setattr(
        torch, "get_device_module", lambda kind: made if kind == "cuda" else real(kind)
    )
    return made


def test_the_device_has_figures_of_its_own(host: Host, backend: Backend) -> None:
    tracker = MemoryTracker(device="cuda:1")
    with tracker.start("init"):
        backend.allocated = backend.top = 1500
    stage = tracker.start("train")
    backend.allocated, backend.top = 1400, 2000
    found = stage.stop()
    gpu = {key: value for key, value in found.items() if "gpu" in key}
    assert gpu == {
        "init_mem_gpu_alloc_delta": 500,
        "init_mem_gpu_peaked_delta": 0,
        "before_init_mem_gpu": 1000,
        "train_mem_gpu_alloc_delta": -100,
        "train_mem_gpu_peaked_delta": 600,
    }
    assert backend.calls == ["init", "reset"] * 2


def test_a_cache_is_emptied_where_there_is_one(backend: Backend) -> None:
    empty_cache("cuda:1")
    assert backend.calls == ["empty"]
    empty_cache(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_memory_of_a_gpu() -> None:
    pytest.importorskip("psutil")
    with MemoryTracker(device="cuda").start("train") as stage:
        kept = torch.ones(24 * MIB, dtype=torch.uint8, device="cuda")
        passing = torch.ones(48 * MIB, dtype=torch.uint8, device="cuda")
        del passing
        found = stage.stop()
    assert found["train_mem_gpu_alloc_delta"] == 24 * MIB
    assert found["train_mem_gpu_peaked_delta"] == 48 * MIB
    assert kept[0] == 1
