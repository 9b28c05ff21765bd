"""One contender of a contest: all its ranks, in turns with those of others."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import gpt
import turns
from multi import overlap, sides

SIZES = {**gpt.SIZES, "tiny": gpt.Size(2, 32, 2, 64, length=16, batch=4)}
TURNS = {"tiny": 3, "small": 50, "124M": 10, "350M": 5}
WARM, PROFILED = 3, 3
"""Steps of a turn that are not timed; steps in a profile."""


class Gate:
    """What every rank calls after a step: rank 0 waits for its turn, the others for rank 0.

    They wait on the host, so that nothing runs on the device meanwhile. In the turn after the last, rank 0
    records a profile.

    Args:
        steps: steps in a turn that are timed.
        rounds: turns that count.
        device: "cuda" or "cpu".
        facts: where rank 0 writes what it found out besides the times.
        trace: where to write a profile; None for no profile.
    """

    def __init__(
        self, steps: int, rounds: int, device: str, facts: Path, trace: Path | None
    ) -> None:
        self._device, self._facts, self._trace = device, facts, trace
        self._length, self._last = steps + WARM, rounds + 1
        self._left, self._turn = self._length, 0
        self._profile: Any = None
        self._group = self._join()
        self._gate = None
        if os.environ.get("RANK", "0") == "0":
            self._gate = turns.Gate(steps, WARM, steps + WARM, self._wait, self._rest, waits=True)
        self._meet()

    def __call__(self) -> None:
        """Count a step."""
        self._left -= 1
        if self._gate is not None:
            if self._turn == self._last and self._trace is not None:
                self._record(self._trace)
            if self._left == 0 and self._turn == 1:
                self._write({"peak_memory": self._peak()})
        if self._left == 0:
            self._wait()
        if self._gate is not None:
            self._gate()
        if self._left == 0:
            self._meet()
            self._left, self._turn = self._length, self._turn + 1

    def _record(self, path: Path) -> None:
        from torch.profiler import ProfilerActivity, profile

        if self._left == PROFILED:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if self._device == "cuda" else []
            self._wait()
            self._profile = profile(activities=kinds)
            self._profile.start()
        elif self._left == 0 and self._profile is not None:
            self._wait()
            self._profile.stop()
            self._profile.export_chrome_trace(str(path))
            self._write({"overlap": overlap.overlap(overlap.read(path))})

    def _wait(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _rest(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.empty_cache()  # all contenders lie on the GPU at once

    def _peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None

    def _join(self) -> Any:
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def _meet(self) -> None:
        if self._group is None:
            return
        import torch.distributed as dist

        if self._gate is None:
            self._rest()
        dist.barrier(self._group)

    def _write(self, found: dict[str, Any]) -> None:
        known = json.loads(self._facts.read_text()) if self._facts.exists() else {}
        self._facts.write_text(json.dumps(known | found))


def work(name: str, size_name: str, world: int, rounds: int, folder: Path, device: str) -> None:
    """Be one rank of one side."""
    side, size = sides.SIDES[name], SIZES[size_name]
    trace = folder / f"{name}.json.gz" if side.profiled else None
    facts = folder / f"{name}.json"

    def make_gate() -> Callable[[], None]:
        gate = Gate(TURNS[size_name], rounds, device, facts, trace)
        if os.environ.get("RANK", "0") == "0":
            facts.write_text(json.dumps({"tokens": size.batch * size.length, "world": world}))
        return gate

    sides.run(side, size, device, make_gate)
