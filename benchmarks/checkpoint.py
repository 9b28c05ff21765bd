"""What a checkpoint costs: saving, saving in the background, verifying, and the memory for it.

    python benchmarks/checkpoint.py [--size 124M] [--rounds 7] [--folder DIR] [--json FILE]

Every side is measured beside its plain counterpart, in one process, in alternating order: a save beside
``safetensors.torch.save_file`` and ``fsync`` of the same bytes; the pause of a background save beside the
synchronous one; a verification beside reading the files and hashing them. Reported are medians, their
spread, and medians of the ratios of sides that ran in the same round. Memory is that of fresh processes.

A save hashes while the disk writes, which needs cores that nothing else uses: the processor's time of every
side is reported as well, and the share of the cores that other processes took. On a shared machine,
``--busy 0.2`` waits for that share to be at most 0.2, and counts only rounds in which it stayed there.
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
from rounds import Rounds, Times, percent, ratios
from shared import at_least
from trainer import checkpoint
from trainstep.serialize import to_flat

SIZES = {"3M": (192, 4, 4096), "12M": (320, 8, 4096), "124M": (768, 12, 50304)}
"""Width, layers and vocabulary of a GPT with its head tied."""

PLAIN, SAVE, PAUSE = "save_file and fsync", "save", "pause of a background save"
READ, VERIFY = "read and hash", "verify"
TARGETS = {SAVE: 1.3, PAUSE: 0.15, VERIFY: 1.2}
"""The largest ratio that each side is meant to have."""


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


def measure_saving(state: ts.TrainState, folder: Path, rounds: Rounds) -> Times:
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

    return rounds.measure(
        {
            PLAIN: clean(lambda: timed(plain_write)),
            SAVE: clean(lambda: timed(lambda: checkpoint.save(folder, 1, contents))),
            PAUSE: clean(pause),
        }
    )


def measure_reading(state: ts.TrainState, folder: Path, rounds: Rounds) -> Times:
    """Measure reading and hashing the files of a checkpoint, and its verification."""
    path = checkpoint.save(folder, 1, make_contents(state))

    def read() -> None:
        for file in path.iterdir():
            with open(file, "rb", buffering=0) as opened:
                hashlib.file_digest(opened, "sha256")

    def verify() -> None:
        assert checkpoint.verify(path) == []

    times = rounds.measure({READ: lambda: timed(read), VERIFY: lambda: timed(verify)})
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


def report(title: str, times: Times, base: str, other: str) -> dict[str, float]:
    """Print a Markdown table of two sides; return the ratios of those that have a target."""
    ms = {name: times.ms[name] for name in (base, other)}
    print(f"\n### {title}\n")
    print(f"| | ms (median) | min to max | of the processor, ms | to {base} | target |")
    print("|-|-|-|-|-|-|")
    for name, ratio in ratios(ms, base).items():
        values, cpu = ms[name], statistics.median(times.cpu[name])
        middle, low, high = statistics.median(values), min(values), max(values)
        target = f"{TARGETS[name]:.2f}" if name == other else ""
        print(
            f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {cpu:.1f} | {ratio:.3f} | {target} |"
        )
    kept, shares = len(times.others), times.others
    rounds = f"{kept} of {kept + len(times.left_out)} rounds"
    print(f"\n{rounds}; other processes took {percent(shares)} of the cores in them", end="")
    print(f", {percent(times.left_out)} in the others." if times.left_out else ".", flush=True)
    return {other: ratios(ms, base)[other]}


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="124M", help="parameters of the state")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's")
    parser.add_argument("--busy", type=float, default=1.0, help="share that others may take")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds to wait for rounds")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.size, options.memory, options.folder)
        return
    rounds = Rounds(options.rounds, options.busy, options.limit)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, state = Path(name), make_state(options.size)
        where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"{options.size} parameters, {size_of(state) / 2**20:.0f} MiB; {where}")
        saving = measure_saving(state, folder, rounds)
        found = report("Saving", saving, PLAIN, SAVE)
        found |= report("Saving in the background", saving, SAVE, PAUSE)
        reading = measure_reading(state, folder, rounds)
        found |= report("Verifying", reading, READ, VERIFY)
        peaks = memory(options.size, folder)
    print("\n### Peak extra memory, as a share of the state's size\n\n| | states |\n|-|-|")
    for how, peak in peaks.items():
        print(f"| {how} | {peak:.2f} |")
    if options.json:
        results = {"size": options.size, "machine": where, "ms": saving.ms | reading.ms}
        results |= {"cpu ms": saving.cpu | reading.cpu, "others": saving.others + reading.others}
        results |= {"ratios": found, "targets": TARGETS, "peak extra memory": peaks}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
