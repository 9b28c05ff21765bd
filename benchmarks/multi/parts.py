"""The parts of a run: each is a process of its own, and writes what it knows as soon as it knows it."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import frozen

from multi import contest, ranks
from multi.contest import Write


@frozen
class Setting:
    """What is measured on.

    Attributes:
        gpus: number of processes.
        device: "cuda" or "cpu".
        dry: smallest sizes, to try whether everything runs.
        out: folder for what is kept.
    """

    gpus: int
    device: str
    dry: bool
    out: Path

    def size(self, name: str) -> str:
        """Return the size to take for one that is meant for GPUs."""
        return "tiny" if self.dry else name


Part = Callable[[Setting, Path, Write], None]


def throughput(size: str, rounds: int) -> Part:
    """Return the part that measures DDP and FSDP2 on a model."""

    def part(on: Setting, folder: Path, write: Write) -> None:
        traces = on.out / "traces.zip" if size == "124M" and not on.dry else None
        _hold(on, contest.THROUGHPUT, size, folder, write, rounds, traces)

    return part


def capture(on: Setting, folder: Path, write: Write) -> None:
    """Measure data-parallel steps in CUDA graphs, on a small model and a large one."""
    found: dict[str, Any] = {}
    for size in ("small",) if on.dry else ("small", "124M"):
        place = folder / size
        place.mkdir()

        def tell(result: dict[str, Any], size: str = size) -> None:
            found[size] = result
            write({"contests": list(found.values())})

        _hold(on, contest.CAPTURE, size, place, tell, 5)


def exact_cost(on: Setting, folder: Path, write: Write) -> None:
    """Measure exact_reduction beside the ordinary reduction, with deterministic kernels."""
    _hold(on, contest.EXACT, "124M", folder, write, 5)


def exact_digests(on: Setting, folder: Path, write: Write) -> None:
    """Compare the bits of trainings on 1, 2, 4, ... ranks, which run at the same time."""
    worlds = [1 << power for power in range(on.gpus.bit_length())]
    size, found = on.size("124M"), {}
    jobs = {}
    for world in worlds:
        out = folder / f"{world}.json"
        most = max(2, on.gpus)
        work = ["--digests", size, str(world), str(most), on.device, str(out)]
        jobs[world] = (ranks.Job(f"training on {world}", work), out)
    failures = []
    for world, (job, out) in jobs.items():
        try:
            job.wait(300 if on.dry else 90)
            found[str(world)] = json.loads(out.read_text())
            print(f"  digests on {world}: there", flush=True)
        except RuntimeError as error:
            failures.append(str(error))
        write({"size": size, "digests": found})
    if failures:
        raise RuntimeError("\n".join(failures))


def resume(on: Setting, folder: Path, write: Write) -> None:
    """Save in parts, resume on one rank, and resume that on several."""
    size, found = on.size("124M"), {}
    for stage in ("save", "one", "back"):
        world = 1 if stage == "one" else on.gpus
        work = ["--resume", stage, size, str(world), str(on.gpus), on.device, str(folder)]
        ranks.Job(f"stage {stage}", work).wait(300 if on.dry else 120)
        found[stage] = {"world": world, **json.loads((folder / f"{stage}.json").read_text())}
        print(f"  stage {stage}: done", flush=True)
        write({"size": size, "stages": found})


def about(on: Setting, folder: Path, write: Write) -> None:
    """Find out what is there: devices, versions, how GPUs are linked, settings of NCCL."""
    import importlib.metadata
    import platform

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "transformers", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["available"] = torch.cuda.device_count()
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if shutil.which("nvidia-smi"):
            told = subprocess.run(
                ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False
            )
            found["links"] = told.stdout
    prefixes = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_", "NVSHMEM_")
    found["environment"] = {n: v for n, v in os.environ.items() if n.startswith(prefixes)}
    write(found)


def _hold(
    on: Setting,
    names: tuple[str, ...],
    size: str,
    folder: Path,
    write: Write,
    rounds: int,
    traces: Path | None = None,
) -> None:
    contest.hold(
        _DRY[names] if on.dry else names,
        on.size(size),
        on.gpus,
        on.device,
        folder,
        write,
        rounds=1 if on.dry else rounds,
        patience=300 if on.dry else 60,
        traces=traces,
    )


_DRY = {
    contest.THROUGHPUT: ("loop_one", "ddp", "trainer", "hf", "fsdp", "trainer_fsdp"),
    contest.CAPTURE: ("captured",),
    contest.EXACT: ("trainer_exact",),
}
"""What a dry run takes of the sides of each contest; the others run the same code."""

PARTS: dict[str, tuple[float, Part]] = {
    "about": (60, about),
    "throughput 124M": (160, throughput("124M", 5)),
    "exact digests": (90, exact_digests),
    "resume": (120, resume),
    "capture": (100, capture),
    "throughput 350M": (130, throughput("350M", 4)),
    "exact cost": (60, exact_cost),
}
"""Seconds that each may take, and what it does; the first ones matter most."""

LARGER = ("throughput 350M",)
"""Parts that differ from others by the size of the model only, and have no dry run."""


def run(name: str, on: Setting, file: Path) -> None:
    """Do one part; ``file`` gets its result, or as much as there is when it fails."""

    def write(result: dict[str, Any]) -> None:
        made = file.with_suffix(".new")
        made.write_text(json.dumps(result))
        made.replace(file)

    with tempfile.TemporaryDirectory() as folder:
        PARTS[name][1](on, Path(folder), write)
