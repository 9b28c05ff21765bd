"""Contenders that take turns: each in a process of its own, one running while the others wait.

In alternating order, so that drift of the machine hits all alike. A contender calls its gate after every
step; at the end of a turn the gate reports the time and waits to be called again.
"""

import contextlib
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared import markdown, spread

Times = dict[str, list[float]]
"""Milliseconds a step: of every contender, one figure for each round."""


class Gate:
    """What a contender calls after every step.

    Args:
        steps: steps in a turn.
        warm: steps at the beginning of a turn that are not timed.
        first: steps before the first turn, to compile and warm up.
        synchronize: waits for the device.
        rest: called at the end of a turn, to give memory back.
        waits: wait to be called before the first turn as well; see ``compete(together=True)``.
    """

    def __init__(
        self,
        steps: int,
        warm: int = 0,
        first: int = 0,
        synchronize: Callable[[], Any] = lambda: None,
        rest: Callable[[], Any] = lambda: None,
        waits: bool = False,
    ) -> None:
        # Bars and log lines of the contenders must not end up among the figures.
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._steps, self._warm = steps, warm
        self._synchronize, self._rest = synchronize, rest
        self._left = first or steps + warm
        self._timed = False
        self._began = 0.0
        if waits:
            sys.stdin.readline()

    def __call__(self) -> None:
        """Count a step."""
        self._left -= 1
        if self._left == self._steps and self._timed:
            self._start()
        if self._left:
            return
        self._synchronize()
        spent = (time.perf_counter() - self._began) / self._steps * 1e3
        print(spent, file=self._out, flush=True)
        self._rest()
        sys.stdin.readline()
        self._left, self._timed = self._steps + self._warm, True
        if not self._warm:
            self._start()

    def _start(self) -> None:
        self._synchronize()
        self._began = time.perf_counter()


class _Worker:
    """A contender's process."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._said, self._ended = "", False
        pipe = subprocess.PIPE
        self._process: Any = subprocess.Popen(
            list(command), stdin=pipe, stdout=pipe, stderr=self._log, text=True
        )

    def call(self) -> None:
        """Tell it that it is its turn."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its silence will show
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def answer(self, patience: float | None) -> float | None:
        """Return the time it reports; None if it has ended, or says nothing for so many seconds.

        What libraries print before there is a gate is passed over.
        """
        while True:
            for line in iter(self._next_line, None):
                with contextlib.suppress(ValueError):
                    return float(line)
            ready, _, _ = select.select([self._process.stdout], [], [], patience)
            more = os.read(self._process.stdout.fileno(), 2**16) if ready else b""
            if not more:
                self._ended = bool(ready)
                return None
            self._said += more.decode(errors="replace")

    def _next_line(self) -> str | None:
        line, end, rest = self._said.partition("\n")
        if not end:
            return None
        self._said = rest
        return line

    def log(self) -> list[str]:
        """Return the lines that it has written so far."""
        self._log.seek(0)
        return self._log.read().strip().splitlines()

    def reason(self) -> str:
        """Return why it has failed: the last error in its log, or the last line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its output ends before it does: one with many GB on a GPU takes a while.
            self._process.wait(30 if self._ended else 1)
        if self._process.poll() is None:
            return "it did not answer in time"
        lines = self.log()
        return next((line for line in reversed(lines) if "Error" in line), " ".join(lines[-1:]))

    def end(self) -> None:
        """End it, and close what was open for it."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        with contextlib.suppress(BrokenPipeError):  # a call that it did not read
            self._process.stdin.close()


def compete(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    titles: Mapping[str, str],
    *,
    together: bool = False,
    patience: float | None = None,
    first: float | None = None,
    after: Callable[[Times], Any] = lambda times: None,
    lost: Callable[[str, list[str]], Any] = lambda name, log: None,
) -> Times:
    """Run contenders in turns.

    Args:
        commands: the command line of each; those that fail are dropped, with a line.
        rounds: turns of each.
        titles: names for messages.
        together: start all at once; each waits to be called for its first turn (``Gate(waits=True)``).
        patience: drop a contender whose turn takes longer than so many seconds.
        first: the same for the first turn, which starts the program; None for ``patience``.
        after: called after every round with the times so far.
        lost: called with the name and the log of a contender that is dropped.
    """
    workers: dict[str, _Worker] = {}
    times: Times = {}

    def turn(name: str, limit: float | None) -> float | None:
        value = workers[name].answer(limit)
        if value is None:
            worker = workers.pop(name)
            print(f"{titles[name]}: skipped ({worker.reason()})", flush=True)
            lost(name, worker.log())
            worker.end()
            times.pop(name, None)
        return value

    if together:
        workers = {name: _Worker(command) for name, command in commands.items()}
    for name, command in commands.items():
        if together:
            workers[name].call()
        else:
            workers[name] = _Worker(command)
        if turn(name, first or patience) is not None:  # a first turn, to warm up
            times[name] = []
    for number in range(rounds):
        order = list(workers)
        for name in order if number % 2 == 0 else reversed(order):
            workers[name].call()
            value = turn(name, patience)
            if value is not None:
                times[name].append(value)
        after(times)
    for worker in workers.values():
        worker.end()
    return times


def ratio(values: list[float], base: list[float]) -> float:
    """Return the median of the ratios of rounds side by side, which cancels slow drift."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def table(times: Times, titles: Mapping[str, str], base: str, extra: Any = None) -> str:
    """Return a Markdown table: medians, spread, the ratio to ``base``, and columns of ``extra``.

    Args:
        times: what ``compete`` returned.
        titles: names of the contenders.
        base: the one to compare with.
        extra: ``(heading, function of the median ms)`` of one more column.
    """
    heading = ["", "ms a step (median)", "min to max", f"of {titles[base]}"]
    heading += [extra[0]] if extra else []
    rows = [heading]
    for name, values in times.items():
        middle = statistics.median(values)
        cells = [titles[name], f"{middle:.3f}", spread(values)]
        cells.append(f"{ratio(values, times[base]):.3f}" if base in times else "")
        cells += [extra[1](middle)] if extra else []
        rows.append(cells)
    return markdown(rows)
