"""What a checkpoint costs: saving, saving in the background, verifying, and the memory for it.

    python benchmarks/checkpoint.py [--size 124M] [--rounds 7] [--folder DIR] [--json FILE]

Every side is measured beside its plain counterpart, in one process, in alternating order: a save beside
``safetensors.torch.save_file`` and ``fsync`` of the same bytes; the pause of a background save beside the
synchronous one; a verification beside reading the files and hashing them. Reported are medians, their
spread, and medians of the ratios of sides that ran in the same round. Memory is that of fresh processes.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import trainstep as ts
from trainer import checkpoint
from trainstep.serialize import to_flat

SIZES = {"3M": (192, 4, 4096), "12M": (320, 8, 4096), "124M": (768, 12, 50304)}
"""Width, layers and vocabulary of a GPT with its head tied."""

PLAIN, SAVE, PAUSE = "save_file and fsync", "save", "pause of a background save"
READ, VERIFY = "read and hash", "verify"
TARGETS = {SAVE: 1.3, PAUSE: 0.15, VERIFY: 1.2}
"""The largest ratio that each side is meant to have."""

Times = dict[str, list[float]]


def shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Return the shapes of a GPT's parameters, head tied."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 4
    return [(vocabulary, width), (1024, width), *block * layers, (width,), (width,)]


def make_state(size: str) -> ts.TrainState:
    """Return a state with float32 parameters and the two moments of AdamW, all of random bits."""
    torch.manual_seed(0)
    params = {f"p{i:03}": torch.randn(shape) for i, shape in enumerate(shapes(*SIZES[size]))}
    moments = ts.optim.adamw().init(params)
    for key in ("exp_avg", "exp_avg_sq"):
        for tensor in moments[key].values():
            tensor.normal_()
    return ts.TrainState(1000, params, {}, moments, ts.rng.key(0))


def make_contents(state: ts.TrainState) -> checkpoint.Contents:
    """Return what the trainer hands to a save of ``state``."""

    def write_model(folder: Path, tensors: dict[str, Tensor]) -> None:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return checkpoint.Contents(write_model, state, {}, "{}", {}, model_tensors=state.params)


def timed(call: Callable[[], Any]) -> float:
    """Return the milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def rounds_of(sides: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Return what every side measures, round by round, in alternating order; the first one warms up."""
    times: Times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            value = sides[name]()
            if number:
                times[name].append(value)
    return times


def measure_saving(state: ts.TrainState, folder: Path, rounds: int) -> Times:
    """Measure a plain write of the bytes, a save, and the pause and the whole of a background save."""
    flat, contents = to_flat(state)[0], make_contents(state)
    writer = checkpoint.BackgroundWriter()

    def plain_write() -> None:
        save_file(flat, folder / "plain.safetensors")
        descriptor = os.open(folder / "plain.safetensors", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def clean(measure: Callable[[], float]) -> Callable[[], float]:
        def measured() -> float:
            value = measure()
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            gc.collect()
            return value

        return measured

    def pause() -> float:
        value = timed(lambda: writer.submit(folder, 1, contents))
        writer.wait()
        return value

    return rounds_of(
        {
            PLAIN: clean(lambda: timed(plain_write)),
            SAVE: clean(lambda: timed(lambda: checkpoint.save(folder, 1, contents))),
            PAUSE: clean(pause),
        },
        rounds,
    )


def measure_reading(state: ts.TrainState, folder: Path, rounds: int) -> Times:
    """Measure reading and hashing the files of a checkpoint, and its verification."""
    path = checkpoint.save(folder, 1, make_contents(state))

    def read() -> None:
        for file in path.iterdir():
            with open(file, "rb", buffering=0) as opened:
                hashlib.file_digest(opened, "sha256")

    def verify() -> None:
        assert checkpoint.verify(path) == []

    times = rounds_of({READ: lambda: timed(read), VERIFY: lambda: timed(verify)}, rounds)
    shutil.rmtree(path)
    return times


def measure_memory(size: str, how: str, folder: Path) -> None:
    """Print how far peak memory rises above what the state takes, as a share of the state's bytes."""
    state = make_state(size)
    contents = make_contents(state)
    before = _status("VmRSS")
    if how == "save":
        checkpoint.save(folder, 1, contents)
    else:
        writer = checkpoint.BackgroundWriter()
        writer.submit(folder, 1, contents)
        writer.wait()
    print((_status("VmHWM") - before) / size_of(state))


def _status(key: str) -> int:
    """Return a figure of this process in bytes, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def size_of(state: ts.TrainState) -> int:
    """Return the bytes of a state's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in to_flat(state)[0].values())


def memory(size: str, folder: Path) -> dict[str, float]:
    """Return the extra memory of both ways to save, in states, each in a fresh process."""
    found = {}
    for how in ("save", "background save"):
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            command = [sys.executable, __file__, "--size", size, "--memory", how, "--folder", inner]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[how] = float(done.stdout)
    return found


def ratios(times: Times, base: str) -> dict[str, float]:
    """Return the median of every side's ratio to ``base`` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(values, times[base], strict=True))
        for name, values in times.items()
    }


def report(title: str, times: Times, base: str) -> dict[str, float]:
    """Print a Markdown table; return the ratios of the sides that have a target."""
    print(f"\n### {title}\n\n| | ms (median) | min to max | to {base} | target |\n|-|-|-|-|-|")
    for name, ratio in ratios(times, base).items():
        values = times[name]
        middle, low, high = statistics.median(values), min(values), max(values)
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        print(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {ratio:.3f} | {target} |")
    return {name: ratio for name, ratio in ratios(times, base).items() if name in TARGETS}


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="124M", help="parameters of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.size, options.memory, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, state = Path(name), make_state(options.size)
        where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"{options.size} parameters, {size_of(state) / 2**20:.0f} MiB; {where}")
        saving = measure_saving(state, folder, options.rounds)
        found = report("Saving", {n: saving[n] for n in (PLAIN, SAVE)}, PLAIN)
        found |= report("Saving in the background", {n: saving[n] for n in (SAVE, PAUSE)}, SAVE)
        reading = measure_reading(state, folder, options.rounds)
        found |= report("Verifying", reading, READ)
        peaks = memory(options.size, folder)
    print("\n### Peak extra memory, as a share of the state's size\n\n| | states |\n|-|-|")
    for how, peak in peaks.items():
        print(f"| {how} | {peak:.2f} |")
    if options.json:
        results = {"size": options.size, "machine": where, "ms": saving | reading}
        results |= {"ratios": found, "targets": TARGETS, "peak extra memory": peaks}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
