"""Sides that take turns in one process, the processor's time for each, and what other processes took."""

import os
import statistics
import time
from collections.abc import Callable

import psutil
from attrs import define, field

Sides = dict[str, Callable[[], float]]
"""For every side, what takes a turn and returns its milliseconds."""
_IDLE = {"idle", "iowait", "guest", "guest_nice"}  # guests are counted as user already


@define
class Times:
    """What was measured in the rounds that count.

    Attributes:
        ms: milliseconds of every side.
        cpu: milliseconds of the processor for a whole turn, what runs in the background included.
        others: share of the cores that other processes took, by round.
        left_out: the same of rounds that do not count.
    """

    ms: dict[str, list[float]]
    cpu: dict[str, list[float]]
    others: list[float] = field(factory=list)
    left_out: list[float] = field(factory=list)


@define
class Rounds:
    """How many rounds count, and which.

    Attributes:
        wanted: how many.
        busy: the largest share of the cores that others may take.
        limit: seconds after which no further round is begun.
    """

    wanted: int
    busy: float
    limit: float

    def measure(self, sides: Sides) -> Times:
        """Let the sides take turns, in alternating order; the first round warms up."""
        times = Times({name: [] for name in sides}, {name: [] for name in sides})
        end = time.monotonic() + self.limit
        order = list(sides)
        self._round(sides, order)
        while len(times.others) < self.wanted and self._quiet(end):
            order.reverse()
            found, share = self._round(sides, order)
            if share > self.busy:
                times.left_out.append(share)
                continue
            times.others.append(share)
            for name, (ms, cpu) in found.items():
                times.ms[name].append(ms)
                times.cpu[name].append(cpu)
        if not times.others:
            raise SystemExit(
                f"no round within {self.limit:.0f} s left others at most {self.busy:.0%} of the cores: "
                f"they took {percent(times.left_out)}. Wait for a quieter machine, or raise --busy"
            )
        return times

    def _round(
        self, sides: Sides, order: list[str]
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """Return milliseconds, and those of the processor, of every side; and the share of others."""
        meter = _Others()
        found = {}
        for name in order:
            before = time.process_time()
            ms = sides[name]()
            found[name] = ms, (time.process_time() - before) * 1e3
        return found, meter.share()

    def _quiet(self, end: float) -> bool:
        """Wait until others take little; returns whether they do before the end."""
        while time.monotonic() < end:
            if self.busy >= 1:
                return True
            meter = _Others()
            time.sleep(1.0)
            if meter.share() <= self.busy:
                return True
        return False


@define
class _Others:
    """The share of the cores that other processes take since it was made."""

    began: float = field(factory=time.perf_counter)
    busy: float = field(factory=lambda: _busy())
    own: float = field(factory=time.process_time)

    def share(self) -> float:
        seconds = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        theirs = _busy() - self.busy - (time.process_time() - self.own)
        return max(0.0, theirs) / seconds


def _busy() -> float:
    """Return the seconds that all cores together have worked."""
    return sum(value for name, value in psutil.cpu_times()._asdict().items() if name not in _IDLE)


def ratios(ms: dict[str, list[float]], base: str) -> dict[str, float]:
    """Return the median of every side's ratio to ``base`` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(values, ms[base], strict=True))
        for name, values in ms.items()
    }


def percent(shares: list[float]) -> str:
    """Return the range of shares in words."""
    return f"{min(shares):.0%} to {max(shares):.0%}" if shares else "nothing"
