"""CUDA graphs on the CPU, as far as who calls what when is concerned: a replay runs Python once more."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import define, field

import trainer.captured
import trainer.lowering
import trainstep.stages
from trainstep.errors import CaptureError
from trainstep.rng import Key, SlotKey


def _no_slot(path: tuple[int, ...]) -> torch.Generator:
    raise AssertionError("nothing is drawn here")


@define(eq=False)
class Pretended:
    """What has been rehearsed, recorded and replayed so far.

    Attributes:
        made: weak references to recordings.
        fail: how recordings fail, by their number from 1.
    """

    rehearsals: int = 0
    recordings: int = 0
    replays: int = 0
    recording: bool = False
    made: list[Any] = field(factory=list)
    fail: dict[int, str] = field(factory=dict)

    def rehearse(self, fn: Callable[[Any], Any], root: Key, device: Any) -> tuple[Any, list[Any]]:
        """Run ``fn`` as a rehearsal does."""
        self.rehearsals += 1
        return fn(SlotKey(_no_slot)), []

    def record(self, fn: Callable[[Any], Any], *args: Any) -> "Pretended.Recording":
        """Return what runs ``fn`` at each replay, or fail."""
        self.recordings += 1
        if self.recordings in self.fail:
            raise CaptureError(self.fail[self.recordings])
        recording = self.Recording(self, fn)
        self.made.append(weakref.ref(recording))
        return recording

    @define(eq=False, weakref_slot=True)
    class Recording:
        """Stands for a graph."""

        told: "Pretended"
        fn: Callable[[Any], Any]

        def replay(self, root: Key) -> Any:
            """Run again."""
            self.told.replays += 1
            self.told.recording = True
            try:
                return self.fn(SlotKey(_no_slot))
            finally:
                self.told.recording = False


def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """Let ``Trainer`` record on the CPU; models must draw no random numbers."""
    told = Pretended()
    monkeypatch.setattr(trainstep.stages, "rehearse", told.rehearse)
    monkeypatch.setattr(trainstep.stages, "record", told.record)
    monkeypatch.setattr(trainer.captured, "is_recording", lambda: told.recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    against = trainer.lowering._against_capture

    def but_for_the_device(*args: Any) -> Any:
        return (reason for reason in against(*args) if reason != "the device is cpu")

    monkeypatch.setattr(trainer.lowering, "_against_capture", but_for_the_device)
    return told
