"""What the pure core costs: optimizer, functionalize, peak memory. On the CPU, or on a GPU if there is one.

    python benchmarks/core.py [--rounds 7] [--device cuda] [--json FILE]

Everything is measured beside its plain PyTorch counterpart, in one process, in alternating order; reported
are medians, their spread, and ratios of the rounds that ran side by side.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from shared import at_least, need_cuda

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from char_lm import ByteGPT

Sides = dict[str, Callable[[], Any]]


def gpt_shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Return the shapes of a GPT's parameters, head tied."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 4
    return [(vocabulary, width), (1024, width), *block * layers, (width,), (width,)]


SIZES = {"12M": (320, 8, 4096), "124M": (768, 12, 50304)}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(sides: Sides, rounds: int, repeat: int, device: str) -> dict[str, list[float]]:
    """Return milliseconds a call of every side, round by round, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                sides[name]()
            synchronize(device)
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / repeat * 1e3)
    return times


def adamw(size: str, device: str) -> Sides:
    """Return one AdamW update: PyTorch's fused one, ours in place, ours on copies."""
    torch.manual_seed(0)
    shapes = gpt_shapes(*SIZES[size])
    params = {f"p{i}": torch.randn(s, device=device) * 0.02 for i, s in enumerate(shapes)}
    grads = {n: torch.randn_like(p) * 0.01 for n, p in params.items()}
    reference = [p.clone().requires_grad_() for p in params.values()]
    for leaf, grad in zip(reference, grads.values(), strict=True):
        leaf.grad = grad
    theirs = torch.optim.AdamW(reference, 1e-4, fused=True)
    ours = ts.optim.adamw(1e-4)
    donated = [{n: p.clone() for n, p in params.items()}, ours.init(params)]
    kept = (params, ours.init(params))

    def in_place() -> None:
        donated[:] = ours.apply(donated[0], grads, donated[1], donate=True)

    return {
        "torch.optim.AdamW(fused)": theirs.step,
        "adamw, donated": in_place,
        "adamw, pure": lambda: ours.apply(kept[0], grads, kept[1]),
        "a copy of parameters and moments": lambda: ts.tree.clone(kept),
    }


def calls(device: str) -> Sides:
    """Return a forward pass of a GPT: the module, and the functionalized module."""
    torch.manual_seed(0)
    model = ByteGPT(128, width=256, layers=6, dropout=0.0).to(device)
    apply, params, buffers = ts.functionalize(model)
    tokens = torch.randint(256, (8, 128), device=device)

    def module() -> Tensor:
        with torch.no_grad():
            return model(tokens)["logits"]

    def functional() -> Tensor:
        with torch.no_grad():
            return apply(params, buffers, tokens)[0]["logits"]

    return {"module(x)": module, "functionalize(module)": functional}


def loop_step(model: Any, device: str) -> Callable[[dict[str, Tensor]], None]:
    """Return a plain PyTorch training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def pure_step(model: Any, device: str) -> Callable[[dict[str, Tensor]], None]:
    """Return our donated step; the module's own tensors are handed over, as the loop uses them."""
    step = ts.donate(
        ts.make_step(
            ts.module_loss(model, lambda call, batch: call(**batch)["loss"]),
            ts.optim.adamw(1e-4),
            transforms=(ts.transforms.clip_by_global_norm(1.0),),
        )
    )
    state = [step.init(model, copy=False)]

    def run(batch: dict[str, Tensor]) -> None:
        state[0] = step(state[0], batch)[0]

    return run


def peak_memory(make: Callable[..., Any], device: str) -> float:
    """Return MiB at the peak of a training step, above what was there before the model."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = ByteGPT(512, width=768, layers=12, heads=12, dropout=0.1).to(device)
    batch = torch.randint(256, (8, 512), device=device)
    step = make(model, device)
    for _ in range(3):
        step({"input_ids": batch, "labels": batch})
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step({"input_ids": batch, "labels": batch})
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_rss(make: Callable[..., Any]) -> float:
    """Return MiB at the peak of resident memory over some steps, in a fresh process of its own."""
    import subprocess

    command = [sys.executable, __file__, "--rss", make.__name__]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_rss(name: str) -> None:
    """Print how far this process's peak resident memory rises above what it held before the model."""
    before = _status("VmRSS")
    torch.manual_seed(0)
    model = ByteGPT(128, width=512, layers=8, heads=8, dropout=0.1)
    batch = torch.randint(256, (4, 128))
    step = {"loop_step": loop_step, "pure_step": pure_step}[name](model, "cpu")
    for _ in range(4):
        step({"input_ids": batch, "labels": batch})
    print(_status("VmHWM") - before)


def _status(key: str) -> float:
    """Return a figure of this process in MiB, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def report(title: str, times: dict[str, list[float]], base: str, unit: str = "ms") -> None:
    """Print a Markdown table with ratios to ``base``."""
    print(f"\n### {title}\n\n| | {unit} (median) | min to max | ratio |\n|---|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[base], strict=True))
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {ratio:.3f} |")


def main() -> None:
    """Measure and print everything."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--rss", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rss:
        measure_rss(options.rss)
        return
    device, rounds = options.device, options.rounds
    if device == "cuda":
        need_cuda()
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    results: dict[str, Any] = {"device": gpu, "torch": torch.__version__}
    for size in SIZES:
        repeat = 20 if device == "cuda" else (10 if size == "12M" else 2)
        times = compare(adamw(size, device), rounds, repeat, device)
        report(f"AdamW, {size} parameters", times, "torch.optim.AdamW(fused)")
        results[f"adamw {size}"] = times
    times = compare(calls(device), rounds, 20, device)
    report("A forward pass", times, "module(x)")
    results["forward"] = times
    makers = {"plain loop": loop_step, "pure step, donated": pure_step}
    peaks = {
        name: [peak_memory(make, device) if device == "cuda" else peak_rss(make)]
        for name, make in makers.items()
    }
    report("Peak memory of training", peaks, "plain loop", "MiB")
    results["peak"] = peaks
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
