"""How much of the time that a device communicates it also computes, from a trace of ``torch.profiler``."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
"""Begin and end, in microseconds."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as disjoint ones, in order; empty ones are left out."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """Return how long the union of intervals is."""
    return sum(end - begin for begin, end in merged(intervals))


def shared(first: Iterable[Interval], second: Iterable[Interval]) -> float:
    """Return for how long some interval of both is under way."""
    mine, others = merged(first), merged(second)
    total, i, j = 0.0, 0, 0
    while i < len(mine) and j < len(others):
        total += max(0.0, min(mine[i][1], others[j][1]) - max(mine[i][0], others[j][0]))
        if mine[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return total


def overlap(events: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return how communication and computation lie in time.

    Args:
        events: ``traceEvents`` of a Chrome trace, of one process. Kernels count, NCCL's being
            communication; where there is none (on the CPU), operators, gloo's being communication.

    Returns:
        In microseconds: ``communication``, ``computation``, ``hidden`` (both at once) and ``span`` (from
        the first to the last of them); and ``share``, hidden of communication, None without any.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    counted = [event for event in complete if event.get("cat") == "kernel"]
    counted = counted or [event for event in complete if _on_host(event)]
    sides: dict[bool, list[Interval]] = {True: [], False: []}
    for event in counted:
        begin = float(event["ts"])
        sides[_communicates(event["name"])].append((begin, begin + float(event["dur"])))
    communication, hidden = length(sides[True]), shared(sides[True], sides[False])
    times = [time for side in sides.values() for interval in side for time in interval]
    return {
        "communication": communication,
        "computation": length(sides[False]),
        "hidden": hidden,
        "span": max(times) - min(times) if times else 0.0,
        "share": hidden / communication if communication else None,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace that ``export_chrome_trace`` wrote, compressed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def _communicates(name: str) -> bool:
    return name.lower().startswith(("nccl", "gloo:"))


def _on_host(event: Mapping[str, Any]) -> bool:
    kinds = ("cpu_op", "user_annotation")
    return event.get("cat") in kinds and event["name"].startswith(("aten::", "gloo:"))
