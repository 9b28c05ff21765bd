"""Equal digests of two runs on a GPU with ``full_determinism=True``, and what that costs.

    python benchmarks/determinism.py [--size 124M] [--steps 24]

Each run is a process of its own: our Trainer, bf16, on the same model and data. The digest is that of the
whole train state, parameters and moments, after the last step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpt
from gpu_sides import CLIP, DECAY, LR, Tokens
from shared import at_least, need_cuda

RUNS: list[dict[str, Any]] = [
    {"full_determinism": deterministic, "capture": capture, "torch_compile": compiled}
    for compiled in (False, True)
    for deterministic, capture, times in (
        (True, "off", 1 if compiled else 2),
        (True, "auto", 2 if compiled else 1),
        (False, "auto", 1),
    )
    for _ in range(times)
]


def work(name: str, steps: int, options: dict[str, Any]) -> None:
    """Train once; prints the digest and the milliseconds of a step."""
    import torch

    import trainstep as ts
    from trainer import Trainer, TrainerCallback, TrainingArguments

    torch.set_float32_matmul_precision("high")
    size = gpt.SIZES[name]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= steps // 2:  # compiled and recorded by then
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch,
            max_steps=steps,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=True,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        trainer = Trainer(
            gpt.build(size, "cpu", dropout=0.1),
            arguments,
            train_dataset=Tokens(size),
            callbacks=[Clock()],
        )
        trainer.train()
    spent = statistics.median(b - a for a, b in pairwise(marks)) * 1e3
    print(json.dumps({"digest": ts.digest(trainer.train_state), "ms": spent}))


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=gpt.SIZES, default="124M")
    parser.add_argument("--steps", type=at_least(2), default=24)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.size, options.steps, json.loads(options.work))
        return
    need_cuda()
    results = []
    print(f"### GPT {options.size}, dropout 0.1, digest after {options.steps} steps\n")
    print(
        "| full_determinism | compiled | CUDA graphs | ms a step | digest |\n|---|---|---|---|---|"
    )
    for run in RUNS:
        command = [sys.executable, __file__, "--size", options.size, "--steps", str(options.steps)]
        done = subprocess.run(
            [*command, "--work", json.dumps(run)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"| {run} | failed: {' '.join(done.stderr.strip().splitlines()[-1:])} |")
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {run['full_determinism']} | {run['torch_compile']} | {run['capture'] == 'auto'} | "
            f"{found['ms']:.2f} | {found['digest'][:16]} |",
            flush=True,
        )
        results.append({**run, **found})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
