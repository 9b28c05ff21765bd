"""Training on several GPUs of one machine: speed, overlap, graphs, exact sums, checkpoints in parts.

    PYTHONPATH=src python benchmarks/multi_gpu.py [--gpus 2] [--out DIR] [--parts ...] [--dry]

Takes less than 8 minutes. Writes ``multi_gpu.json``, ``multi_gpu.md`` and ``traces.zip`` to DIR after
every part; a part that fails, or takes too long, is named with its error, and the others go on. Models are
those of ``gpt.py``, in bfloat16; every rank has its own batch of the full size. Settings of NCCL are those
of the environment, and NVLink multicast is off unless they say otherwise. With ``--dry`` everything runs on
the CPU with 2 processes, gloo and tiny models, to see whether it does; its figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multi import parts, ranks, report


def work(options: argparse.Namespace) -> bool:
    """Be a process that another one of these has started, if the options say so."""
    if options.contend:
        side, size, world, rounds, folder, device = options.contend
        ranks.spread(sys.argv[1:], int(world), grouped=side not in ("loop_one", "trainer_one"))
        from multi import contender

        contender.work(side, size, int(world), int(rounds), Path(folder), device)
    elif options.digests:
        size, world, most, device, out = options.digests
        ranks.spread(sys.argv[1:], int(world), grouped=int(world) > 1)
        from multi import digests

        digests.run(size, int(world), int(most), device, Path(out))
    elif options.resume:
        stage, size, world, most, device, folder = options.resume
        ranks.spread(sys.argv[1:], int(world), grouped=int(world) > 1)
        from multi import resume

        resume.run(stage, size, int(world), int(most), device, Path(folder))
    elif options.part:
        name, file = options.part
        parts.run(name, setting(options), Path(file))
    else:
        return False
    return True


def setting(options: argparse.Namespace) -> parts.Setting:
    """Return what the options say is measured on."""
    device = "cpu" if options.dry else "cuda"
    return parts.Setting(options.gpus, device, options.dry, options.out)


def attempt(name: str, limit: float, on: parts.Setting, scratch: Path) -> dict[str, Any]:
    """Do one part in a process of its own; returns its result, or what there is of it, and its error."""
    file = scratch / "result.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, str(file), "--out", str(on.out)]
    command += ["--gpus", str(on.gpus), *(["--dry"] if on.dry else [])]
    began = time.monotonic()
    error = None
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            if process.wait(limit) != 0:
                log.seek(0)
                error = "\n".join(log.read().strip().splitlines()[-25:])
        except subprocess.TimeoutExpired:
            process.kill()  # all that it has started end with it
            process.wait()
            error = f"stopped after {limit:.0f} s; what it had found by then is kept"
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "error": error}
    found["result"] = json.loads(file.read_text()) if file.exists() else None
    return found


def measure(names: Sequence[str], budget: float, on: parts.Setting) -> dict[str, Any]:
    """Do the parts one after the other, and write down what is known after each."""
    began = time.monotonic()
    results: dict[str, Any] = {"gpus": on.gpus, "dry": on.dry, "parts": {}}
    on.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        limit = min(parts.PARTS[name][0], budget - (time.monotonic() - began))
        if on.dry:  # a busy machine may take its time
            limit = 600.0
        print(f"{name} ...", flush=True)
        if limit < 10:
            found = {"seconds": 0.0, "error": "left out, no time was left", "result": None}
        else:
            with tempfile.TemporaryDirectory() as scratch:
                found = attempt(name, limit, on, Path(scratch))
        results["parts"][name] = found
        print(f"{name}: {found['seconds']:.0f} s", flush=True)
        if found["error"]:
            print(found["error"], flush=True)
        if name == "about" and not on.dry and found["result"] is not None:
            most = found["result"]["available"]
            if most < on.gpus:
                raise SystemExit(f"--gpus {on.gpus}, but this machine has {most}")
        (on.out / "multi_gpu.json").write_text(json.dumps(results, indent=1))
        (on.out / "multi_gpu.md").write_text(report.markdown(results))
    return results


def main() -> None:
    """Measure, or be a part of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--gpus", type=int, default=2, help="processes, a power of two; 1 also runs"
    )
    parser.add_argument("--out", type=Path, default=Path("multi_gpu"), help="folder for results")
    parser.add_argument("--parts", nargs="+", choices=parts.PARTS)
    parser.add_argument("--budget", type=float, default=460, help="seconds for all parts")
    parser.add_argument("--dry", action="store_true", help="try everything on the CPU")
    hidden = {"part": 2, "contend": 6, "digests": 5, "resume": 6}
    for name, count in hidden.items():
        parser.add_argument(f"--{name}", nargs=count, help=argparse.SUPPRESS)
    options = parser.parse_args()
    ranks.quieten()
    ranks.die_with_parent()
    if work(options):
        return
    if options.gpus < 1 or options.gpus & (options.gpus - 1):
        parser.error(f"--gpus: expected a power of two, got {options.gpus}")
    every = [name for name in parts.PARTS if not (options.dry and name in parts.LARGER)]
    results = measure(options.parts or every, options.budget, setting(options))
    print(f"\n{report.markdown(results)}")
    if any(found["error"] for found in results["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
