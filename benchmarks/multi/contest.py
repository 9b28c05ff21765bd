"""Contests: sides that take turns on the same GPUs, and what a profile says of them."""

import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import turns
from multi import ranks, sides

ONE = ("loop_one", "trainer_one")
THROUGHPUT = (
    *ONE,
    "ddp",
    "trainer",
    "hf",
    "fsdp",
    "fsdp_plain",
    "trainer_fsdp",
    "hf_fsdp",
)
CAPTURE = ("loop_one", "ddp", "pure", "captured", "exact", "exact_captured")
EXACT = ("trainer_det", "trainer_exact")
SCALED = ("ddp", "trainer")
"""Sides that are measured on 2 GPUs as well, where there are more."""

Write = Callable[[dict[str, Any]], None]


def entries(names: Iterable[str], gpus: int) -> dict[str, tuple[str, int]]:
    """Return key -> (side, processes) of a contest on ``gpus``."""
    found = {name: (name, 1 if name in ONE else gpus) for name in names}
    if gpus > 2:
        found |= {f"{name}@2": (name, 2) for name in names if name in SCALED}
    return found


def hold(
    names: Iterable[str],
    size: str,
    gpus: int,
    device: str,
    folder: Path,
    write: Write,
    *,
    rounds: int,
    patience: float,
    traces: Path | None = None,
) -> None:
    """Let sides take turns; hands ``write`` all that is known after every round.

    Args:
        names: keys of ``SIDES``.
        size: of the model.
        gpus: how many processes the sides have that are not of one.
        device: "cuda" or "cpu".
        folder: for files of the contenders.
        write: takes the result so far.
        rounds: turns that count; one more is for profiles.
        patience: seconds after which a contender is given up; twice as many for its start.
        traces: a zip file for the profiles; None to drop them.
    """
    chosen = entries(names, gpus)
    commands, titles, logs = {}, {}, {}
    for key, (side, world) in chosen.items():
        place = folder / key
        place.mkdir()
        work = [side, size, str(world), str(rounds), str(place), device]
        commands[key] = [sys.executable, ranks.SCRIPT, "--contend", *work]
        titles[key] = f"{sides.SIDES[side].title}" + (f", {world}" if "@" in key else "")

    def told(times: turns.Times) -> dict[str, Any]:
        facts = {}
        for key, (side, _) in chosen.items():
            path = folder / key / f"{side}.json"
            if key in times and path.exists():
                facts[key] = json.loads(path.read_text())
        counted = {key: values[:rounds] for key, values in times.items()}
        missing = [key for key in chosen if key not in times]
        return {
            "size": size,
            "gpus": gpus,
            "sides": {key: side for key, (side, _) in chosen.items()},
            "times": counted,
            "facts": facts,
            "missing": {key: logs.get(key, "") for key in missing},
        }

    def lost(key: str, log: list[str]) -> None:
        logs[key] = "\n".join(log[-20:])

    def after(times: turns.Times) -> None:
        count = max(map(len, times.values()), default=0)
        print(f"  {size}: {count} of {rounds + 1} rounds, the last for profiles", flush=True)
        write(told(times))

    times = turns.compete(
        commands,
        rounds + 1,
        titles,
        together=True,
        patience=patience,
        first=2 * patience,
        after=after,
    )
    write(told(times))
    if traces is not None:
        with zipfile.ZipFile(traces, "w") as archive:
            for path in sorted(folder.glob("*/*.json.gz")):
                archive.write(path, f"{size}-{path.parent.name}.json.gz")
