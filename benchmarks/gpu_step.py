"""What a training step of a GPT costs on a GPU: ours in every lowering, PyTorch, other trainers, JAX.

    python benchmarks/gpu_step.py [--sizes small 124M 350M] [--sides ...] [--accumulation 4]

bfloat16 autocast, fused AdamW with decay 0.1, clipping at 1. Loops get a batch that lies on the GPU;
trainers load theirs from a dataset in memory, log every 50 steps, and save nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt
import turns
from gpu_sides import contender
from shared import at_least, need_cuda, versions

SIDES = {
    "loop": "plain PyTorch loop",
    "loop_compiled": "plain loop, compiled model",
    "step": "pure step, donated",
    "step_captured": "pure step, captured",
    "step_compiled": "pure step, compiled",
    "step_both": "pure step, compiled and captured",
    "step_whole": "pure step, compiled as one graph and captured",
    "trainer_off": "our Trainer, capture off",
    "trainer": "our Trainer",
    "trainer_compiled": "our Trainer, torch_compile",
    "hf": "Hugging Face Trainer",
    "hf_compiled": "Hugging Face Trainer, torch_compile",
    "lightning": "Lightning Trainer, no clipping",
    "jax": "JAX, jit, donated",
}
TURNS = {"small": 100, "124M": 10, "350M": 5}


def work(side: str, name: str, accumulation: int) -> None:
    """Be one contender."""
    size = gpt.SIZES[name]
    steps = TURNS[name]
    if side == "jax":
        import jax_gpt

        def gate(wait: Callable[[], Any]) -> turns.Gate:
            return turns.Gate(steps, 2, 8, wait, waits=True)

        jax_gpt.run(size, gate, accumulation)
        return
    import torch

    torch.set_float32_matmul_precision("high")
    wait, rest = torch.cuda.synchronize, torch.cuda.empty_cache  # all lie on the GPU at once
    contender(side, size, accumulation)(lambda: turns.Gate(steps, 3, 12, wait, rest, waits=True))


def main() -> None:
    """Measure all contenders at all sizes and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=gpt.SIZES, default=["small", "124M"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--accumulation", type=at_least(1), default=1, help="micro-batches to an update"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, name, accumulation = options.work
        work(side, name, int(accumulation))
        return
    need_cuda()
    from trainer.figures import peak_operations  # contenders do not need it

    about = versions("cuda")
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {"about": about, "accumulation": options.accumulation}
    peak = peak_operations(about["device"])
    for name in options.sizes:
        size = gpt.SIZES[name]
        commands = {
            side: [sys.executable, __file__, "--work", side, name, str(options.accumulation)]
            for side in options.sides
        }

        def keep(times: turns.Times, name: str = name) -> None:
            results[name] = times
            if options.json:
                options.json.write_text(json.dumps(results, indent=2))

        times = turns.compete(
            commands, options.rounds, SIDES, together=True, patience=300, after=keep
        )
        count = sum(p.numel() for p in gpt.build(size, "meta").parameters())
        flops = gpt.flops(size, count) * options.accumulation
        mfu = ("MFU", lambda ms, f=flops: f"{f / (ms / 1e3) / peak:.1%}") if peak else None
        shape = f"{size.batch} x {size.length}, accumulation {options.accumulation}"
        print(f"\n### GPT {name}, {count / 1e6:.0f} M parameters, batch {shape}\n")
        print(turns.table(times, SIDES, "loop", mfu), flush=True)


if __name__ == "__main__":
    main()
