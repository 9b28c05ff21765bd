"""Markdown of what was measured."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import turns
from multi.sides import SIDES

SCALING, OVERHEAD = 0.95, 1.03
"""What is aimed at: the least efficiency of DDP, the most time of a Trainer, of a loop written by hand."""


def markdown(results: Mapping[str, Any]) -> str:
    """Return tables of all parts that there are, and the errors of those that failed."""
    lines = [f"# Training on {results['gpus']} GPUs", ""]
    if results["dry"]:
        lines += ["A dry run on the CPU: the figures mean nothing.", ""]
    for name, found in results["parts"].items():
        lines += [f"## {name}", "", f"{found['seconds']:.0f} s", ""]
        if found["result"] is not None:
            lines += _KINDS[name.split()[0] if name.startswith("throughput") else name](
                found["result"]
            )
        if found["error"]:
            lines += ["It failed:", "", "```", found["error"], "```", ""]
    return "\n".join(lines)


def grid(rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table; the first row is the heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines.insert(1, "|" + "---|" * (lines[0].count("|") - 1))
    return [*lines, ""]


def contest_table(result: Mapping[str, Any]) -> list[str]:
    """Return the table of a contest: times, throughput, scaling, ratio to the hand-written one, overlap."""
    times = result["times"]
    if not any(times.values()):
        return ["No round was finished.", "", *_missing(result)]
    heading = ["", "GPUs", "ms a step", "min to max", "tokens/s a GPU", "efficiency"]
    heading += ["of hand-written", "hidden communication", "peak GB a GPU"]
    rows: list[list[str]] = [heading]
    for key, values in ((key, values) for key, values in times.items() if values):
        side, facts = SIDES[result["sides"][key]], result["facts"].get(key, {})
        middle = statistics.median(values)
        suffix = key[key.index("@") :] if "@" in key else ""
        rival = side.rival if side.rival is None else side.rival + suffix
        peak = facts.get("peak_memory")
        rows.append(
            [
                side.title,
                str(facts.get("world", "")),
                f"{middle:.2f}",
                f"{min(values):.2f} to {max(values):.2f}",
                f"{facts['tokens'] / middle * 1e3:,.0f}" if facts else "",
                _ratio(times, side.base, key),
                _ratio(times, key, rival) if rival != key else "",
                hidden(facts.get("overlap")),
                f"{peak / 1e9:.2f}" if peak else "",
            ]
        )
    lines = [f"GPT {result['size']}, every GPU its own batch.", "", *grid(rows)]
    return lines + _missing(result)


def _missing(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, log in result["missing"].items():
        lines += [f"{SIDES[result['sides'][key]].title}: not measured.", "", "```", log, "```", ""]
    return lines


def hidden(found: Mapping[str, Any] | None) -> str:
    """Say how much of the communication in a profile was hidden behind computation."""
    if not found or found["share"] is None:
        return ""
    return f"{found['share']:.0%} of {found['communication'] / 1e3:.2f} ms"


def _ratio(times: Mapping[str, list[float]], above: str | None, below: str | None) -> str:
    if not (above and below and times.get(above) and times.get(below)):
        return ""
    # A part that was stopped within a round may know one more time of one side.
    count = min(len(times[above]), len(times[below]))
    return f"{turns.ratio(times[above][:count], times[below][:count]):.3f}"


def _throughput(result: Mapping[str, Any]) -> list[str]:
    aim = f"Aimed at: efficiency of at least {SCALING} for DDP, at most {OVERHEAD} of hand-written."
    return [*contest_table(result), aim, ""]


def _capture(result: Mapping[str, Any]) -> list[str]:
    return [line for one in result["contests"] for line in contest_table(one)]


def _digests(result: Mapping[str, Any]) -> list[str]:
    found = result["digests"]
    rows = [["ranks", "Trainer, exact_reduction", "data_parallel(exact=True)"]]
    rows += [
        [world, each["trainer"][:16], each["data_parallel"][:16]] for world, each in found.items()
    ]
    lines = [f"GPT {result['size']}, deterministic kernels, dropout 0.1.", "", *grid(rows)]
    if len(found) < 2:
        return [*lines, "There is nothing to compare.", ""]
    for who in ("trainer", "data_parallel"):
        same = len({each[who] for each in found.values()}) == 1
        lines.append(f"{who}: {'the same bits' if same else 'the bits DIFFER'} on all.")
    return [*lines, ""]


def _resume(result: Mapping[str, Any]) -> list[str]:
    stages = result["stages"]
    rows = [["stage", "ranks", "from step", "to step", "the state it began with"]]
    before = None
    for name, found in stages.items():
        began = "new"
        if before is not None:
            began = "as it was saved" if found["began"] == before["ended"] else "DIFFERS"
        rows.append([name, found["world"], found["began_at"], found["ended_at"], began])
        before = found
    lines = grid(rows)
    if "save" in stages:
        save = stages["save"]
        # The first save makes the buffers that later ones copy to.
        first, *later = save["async_stalls"]
        sync = statistics.median(save["stalls"][1:])
        rows = [
            ["a checkpoint of " + f"{save['bytes'] / 1e9:.2f} GB stops training for", "ms"],
            ["sync, median after the first", f"{sync:.1f}"],
            ["async, the first", f"{first:.1f}"],
            ["async, median after the first", f"{statistics.median(later):.1f}"],
            ["async of sync", f"{statistics.median(later) / sync:.3f}"],
        ]
        lines += grid(rows)
    return lines


def _about(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {name}: {value}"
        for name, value in result.items()
        if name not in ("links", "environment")
    ]
    lines += [f"- {name}={value}" for name, value in result["environment"].items()]
    if result.get("links"):
        lines += ["", "```", result["links"].rstrip(), "```"]
    return [*lines, ""]


_KINDS = {
    "about": _about,
    "throughput": _throughput,
    "capture": _capture,
    "exact digests": _digests,
    "exact cost": contest_table,
    "resume": _resume,
}
