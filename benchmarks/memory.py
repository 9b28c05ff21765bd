"""Peak memory of a training step: plain loop, donated step, CUDA graphs, and the head without its logits.

    python benchmarks/memory.py [--size 124M] [--sides ...] [--rounds 5] [--json FILE]

Every measurement is a process of its own, in alternating order. On a GPU: the most that PyTorch had
allocated in a step, and had reserved since the start, with bfloat16 autocast. On the CPU: how far the
resident memory rose above what the process held before there was a model, all code loaded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpt
import trainstep as ts
from shared import at_least, markdown, need_cuda, spread, versions

SIDES = {
    "loop": "plain PyTorch loop",
    "step": "pure step, donated",
    "captured": "pure step, captured",
    "head": "pure step, donated, linear_cross_entropy",
    "captured_head": "pure step, captured, linear_cross_entropy",
}
SIZES = {
    "head": gpt.Size(layers=2, width=256, heads=4, vocabulary=50304, length=128, batch=8),
    **gpt.SIZES,
}
TINY = gpt.Size(layers=1, width=8, heads=1, vocabulary=8, length=8, batch=1)
WARM, STEPS = 5, 5
MIB = 2**20
Step = Callable[[dict[str, Tensor]], Tensor]
"""Trains on a batch; returns the loss."""


class Chunked(gpt.GPT):
    """The same model, whose loss is computed without ever holding all logits."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return ``{"loss"}``, as a sum and a weight."""
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return {"loss": ts.linear_cross_entropy(self.norm(x), self.head.weight, labels)}


def loop_step(model: gpt.GPT, device: str) -> Step:
    """Return a plain PyTorch training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def pure_step(model: gpt.GPT, device: str, lower: Callable[[Any], Any]) -> Step:
    """Return our step; the module's own tensors are handed over, as the loop uses them."""

    def loss(call: Any, batch: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return call(**batch)["loss"]

    made = ts.make_step(
        ts.module_loss(model, loss),
        ts.optim.adamw(1e-4),
        transforms=(ts.transforms.clip_by_global_norm(1.0),),
    )
    state = [made.init(model, copy=False)]
    step = lower(made)

    def run(batch: dict[str, Tensor]) -> Tensor:
        state[0], metrics = step(state[0], batch)
        return metrics["loss"]

    return run


def make(side: str, size: gpt.Size, device: str) -> Step:
    """Return the step of a side."""
    model = gpt.build(size, device, kind=Chunked if side.endswith("head") else gpt.GPT)
    if side == "loop":
        return loop_step(model, device)
    return pure_step(model, device, ts.capture if side.startswith("captured") else ts.donate)


def work(side: str, size: gpt.Size, device: str) -> None:
    """Measure one side; prints the figures as JSON."""
    torch.set_float32_matmul_precision("high")
    # What a side imports when it is first used (PyTorch's optimizers, tens of MiB) is not of the step.
    tiny = gpt.batch(TINY)
    make(side, TINY, device)({name: tensor.to(device) for name, tensor in tiny.items()})
    before = 0.0 if device == "cuda" else _status("VmRSS")
    step = make(side, size, device)
    batch = {name: tensor.to(device) for name, tensor in gpt.batch(size).items()}
    loss, *_ = (step(batch) for _ in range(WARM))
    found: dict[str, float] = {"first loss": float(loss)}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        reserved = torch.cuda.max_memory_reserved()
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    found["ms a step"] = (time.perf_counter() - began) / STEPS * 1e3
    if device == "cuda":
        found["peak MiB"] = torch.cuda.max_memory_allocated() / MIB
        found["reserved MiB"] = max(reserved, torch.cuda.max_memory_reserved()) / MIB
    else:
        found["peak MiB"] = _status("VmHWM") - before
    print(json.dumps(found))


def _status(key: str) -> float:
    """Return a figure of this process in MiB, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure(sides: list[str], size: str, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the figures of every side, round by round; sides that fail are dropped, with a line."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for number in range(rounds):
        order = list(found) if number % 2 == 0 else list(reversed(found))
        for side in order:
            command = [sys.executable, __file__, "--device", device, "--work", side, size]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{SIDES[side]}: failed ({' '.join(done.stderr.strip().splitlines()[-1:])})")
                del found[side]
                continue
            for name, value in json.loads(done.stdout.strip().splitlines()[-1]).items():
                found[side].setdefault(name, []).append(value)
    return found


def table(found: dict[str, dict[str, Any]], base: str) -> str:
    """Return a Markdown table: medians, the spread of what varies, the peak's ratio to ``base``."""
    reserved = any("reserved MiB" in figures for figures in found.values())
    heading = ["", "peak MiB (median)", "min to max", f"of {SIDES[base]}"]
    heading += ["reserved MiB"] if reserved else []
    rows = [[*heading, "ms a step (median)", "min to max", "first loss"]]
    for side, figures in found.items():
        peaks, ms = figures["peak MiB"], figures["ms a step"]
        cells = [SIDES[side], f"{statistics.median(peaks):.1f}", spread(peaks, 1)]
        pairs = zip(peaks, found[base]["peak MiB"], strict=True) if base in found else ()
        ratios = [mine / theirs for mine, theirs in pairs]
        cells.append(f"{statistics.median(ratios):.3f}" if ratios else "")
        cells += [f"{statistics.median(figures['reserved MiB']):.1f}"] if reserved else []
        cells += [f"{statistics.median(ms):.1f}", spread(ms, 1)]
        rows.append([*cells, f"{statistics.median(figures['first loss']):.4f}"])
    return markdown(rows)


def main() -> None:
    """Measure all sides and print a table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="124M" if cuda else "head")
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if options.work:
        side, name = options.work
        work(side, SIZES[name], device)
        return
    if device == "cuda":
        need_cuda()
    # On the CPU a captured step is the donated one.
    usual = [side for side in SIDES if device == "cuda" or not side.startswith("captured")]
    about = {**versions(device), "size": gpt.describe(SIZES[options.size])}
    print(f"{about['device']}, torch {about['torch']}")
    size = SIZES[options.size]
    print(
        f"\n### GPT {options.size}, batch {size.batch} x {size.length}, {size.vocabulary} classes\n"
    )
    found = measure(options.sides or usual, options.size, device, options.rounds)
    print(table(found, "loop"))
    if options.json:
        options.json.write_text(json.dumps({"about": about, "sides": found}, indent=2))


if __name__ == "__main__":
    main()
