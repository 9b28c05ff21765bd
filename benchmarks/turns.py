"""Contenders that take turns: each in a process of its own, one running while the others wait.

In alternating order, so that drift of the machine hits all alike. A contender calls its gate after every
step; at the end of a turn the gate reports the time and waits to be called again.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """

    def __init__(
        self,
        steps: int,
        warm: int = 0,
        first: int = 0,
        synchronize: Callable[[], Any] = lambda: None,
        rest: Callable[[], Any] = lambda: None,
    ) -> None:
        # Bars and log lines of the contenders must not end up among the figures.
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._steps, self._warm = steps, warm
        self._synchronize, self._rest = synchronize, rest
        self._left = first or steps + warm
        self._timed = False
        self._began = 0.0

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


def compete(commands: Mapping[str, Sequence[str]], rounds: int, titles: Mapping[str, str]) -> Times:
    """Run contenders in turns.

    Args:
        commands: the command line of each; those that fail to start are dropped, with a line.
        rounds: turns of each.
        titles: names for messages.
    """
    workers: dict[str, Any] = {}
    times: Times = {}
    for name, command in commands.items():
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        pipe = subprocess.PIPE
        worker = subprocess.Popen(list(command), stdin=pipe, stdout=pipe, stderr=log, text=True)
        if worker.stdout.readline():  # type: ignore[union-attr]  # a first turn, to warm up
            workers[name], times[name] = worker, []
        else:
            log.seek(0)
            reason = " ".join(log.read().strip().splitlines()[-1:])
            print(f"{titles[name]}: skipped ({reason})", flush=True)
    for number in range(rounds):
        order = list(workers)
        for name in order if number % 2 == 0 else reversed(order):
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            times[name].append(float(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.kill()
        worker.wait()
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
    rows = [heading, ["---"] * len(heading)]
    for name, values in times.items():
        middle = statistics.median(values)
        cells = [titles[name], f"{middle:.3f}", f"{min(values):.3f} to {max(values):.3f}"]
        cells.append(f"{ratio(values, times[base]):.3f}" if base in times else "")
        cells += [extra[1](middle)] if extra else []
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
