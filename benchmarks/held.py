"""Memory that a rank holds at the peak of a step, beside the formulas of traffic.py. On the CPU, on Linux.

    torchrun --standalone --nproc_per_node=2 benchmarks/held.py [ddp | pure | exact | exact16]

One case for each run, because allocators keep what they once had. The model has 16 layers, 64 MiB in all.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import traffic
import trainstep as ts

WIDTH, LAYERS = 1024, 16
SIZE = LAYERS * WIDTH * WIDTH * 4


def status(name: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let the kernel measure the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def build() -> nn.Module:
    """Return the model."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def ddp() -> Callable[[], None]:
    """Return a step of DDP."""
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    x = torch.randn(2, WIDTH)

    def step() -> None:
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pure(exact: bool, microbatches: int) -> Callable[[], None]:
    """Return a donated data-parallel step of a state that took over the module's tensors."""
    model = build()
    loss = ts.module_loss(model, lambda call, x: call(x).square().mean())
    step = ts.donate(ts.make_step(loss, ts.optim.adamw(1e-3), microbatches="iter"))
    parallel = ts.data_parallel(step, exact=exact)
    state = step.init(model, copy=False)
    batch = [torch.randn(2, WIDTH) for _ in range(microbatches)]

    def once() -> None:
        nonlocal state
        state, _ = parallel(state, batch)

    return once


CASES: dict[str, tuple[Callable[[], Callable[[], None]], float]] = {
    "ddp": (ddp, traffic.ddp_held(SIZE)),
    "pure": (lambda: pure(False, 2), traffic.pure_held(SIZE)),
    "exact": (lambda: pure(True, 2), traffic.exact_held(SIZE, 2)),
    "exact16": (lambda: pure(True, 16), traffic.exact_held(SIZE, 16)),
}


def main() -> None:
    """Measure one case."""
    case, formula = CASES[sys.argv[1]]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1 << 20))
    nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
    base = status("VmRSS")
    step = case()
    for number in range(4):
        if number == 2:
            forget_peak()
        step()
    peak = (status("VmHWM") - base) / SIZE
    if dist.get_rank() == 0:
        print(f"{sys.argv[1]}: {peak:.2f} times the parameters; formula {formula / SIZE:.0f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        # Otherwise freed memory stays with the allocator, and counts.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "500000"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
