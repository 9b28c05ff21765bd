"""What `import trainer` costs, beside `import torch` and accelerate, without which nobody trains.

    python benchmarks/import_time.py [--rounds 9] [--json FILE]

Every side is a process of its own that imports its modules and ends. The sides take turns, in alternating
order, so that drift hits all alike; a first round, which fills the caches, is not counted.
Reported are medians in seconds, their spread, and the ratio to torch and accelerate alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared import at_least, markdown, spread

BASE = "import torch, accelerate"
SIDES = {
    "base": (f"`{BASE}`", BASE),
    "trainer": ("and `import trainer`", f"{BASE}; import trainer"),
    "names": (
        "and `from trainer import Trainer`",
        f"{BASE}; from trainer import Trainer, TrainingArguments",
    ),
    "hf": (
        "and `from transformers import Trainer`",
        f"{BASE}; from transformers import Trainer, TrainingArguments",
    ),
}
LIMIT = 1.2
SOURCE = Path(__file__).resolve().parents[1] / "src"


def seconds(code: str, cache: str) -> tuple[float, float]:
    """Return the time and the processor time that a fresh interpreter takes for ``code``.

    Its own start is not counted. Bytecode is kept in the folder ``cache``, so that all sides have it.

    Raises:
        RuntimeError: with what it wrote, if it fails.
    """
    timed = (
        "import time; wall, cpu = time.perf_counter(), time.process_time(); "
        f"{code}; print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", timed],
        env=os.environ
        | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        | {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{code!r} failed:\n{done.stderr}")
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def measure(sides: list[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Time every side once a round, in turn; the order is reversed every other round."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(-1, rounds):
            for side in sides if number % 2 else reversed(sides):
                taken = seconds(SIDES[side][1], cache)
                if number >= 0:
                    times[side].append(taken)
    return times


def summary(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return medians, spreads and ratios to the base, with what they were taken on."""
    medians = {
        side: [statistics.median(v) for v in zip(*taken, strict=True)]
        for side, taken in times.items()
    }
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "rounds": len(times["base"]),
        "limit": LIMIT,
        "sides": {
            side: {
                "median_s": round(medians[side][0], 4),
                "min_s": round(min(wall for wall, _ in taken), 4),
                "max_s": round(max(wall for wall, _ in taken), 4),
                "ratio": round(medians[side][0] / medians["base"][0], 4),
                "cpu_median_s": round(medians[side][1], 4),
                "cpu_ratio": round(medians[side][1] / medians["base"][1], 4),
            }
            for side, taken in times.items()
        },
    }


def table(sides: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of what ``summary`` found for every side."""
    rows = [["", "wall clock, s (median)", "ratio", "processor, s", "ratio"]]
    for side, found in sides.items():
        wall = f"{found['median_s']:.3f} ({spread([found['min_s'], found['max_s']])})"
        cpu = [f"{found['cpu_median_s']:.3f}", f"{found['cpu_ratio']:.2f}"]
        rows.append([SIDES[side][0], wall, f"{found['ratio']:.2f}", *cpu])
    return markdown(rows)


def main() -> int:
    """Measure, print, and tell by the exit status whether ``import trainer`` kept the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=at_least(5), default=9, help="rounds that count, at least 5"
    )
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["trainer", "names"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    sides = ["base", *(side for side in given.sides if side != "base")]
    found = summary(measure(sides, given.rounds))
    print(f"Python {found['python']}, {found['machine']}, {found['rounds']} rounds\n")
    print(table(found["sides"]))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return int("trainer" in sides and found["sides"]["trainer"]["ratio"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
