"""What a training step of a GPT costs on a GPU: ours in every lowering, PyTorch, other trainers, JAX.

    python benchmarks/gpu_step.py [--sizes small 124M 350M] [--sides ...] [--accumulation 4]

bfloat16 autocast, fused AdamW with decay 0.1, clipping at 1. Loops get a batch that lies on the GPU;
trainers load theirs from a dataset in memory, log every 50 steps, and save nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpt
import turns

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
LR, DECAY, CLIP = 3e-4, 0.1, 1.0
TURNS = {"small": 100, "124M": 10, "350M": 5}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense, per second
FOREVER = 10**6
MakeGate = Callable[[], Callable[[], None]]
"""Waits for the first turn and returns what is called after every step."""


def run_loop(size: gpt.Size, make_gate: MakeGate, accumulation: int, compiled: bool) -> None:
    """Train as one writes it by hand."""
    import torch

    model = gpt.build(size, "cuda")
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, fused=True)
    batch = {name: tensor.cuda() for name, tensor in gpt.batch(size).items()}
    gate = make_gate()
    while True:
        for _ in range(accumulation):
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(**batch)["loss"] / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        gate()


def run_step(
    size: gpt.Size, make_gate: MakeGate, accumulation: int, lower: tuple[str, ...]
) -> None:
    """Train with the pure step."""
    import torch

    import trainstep as ts

    model = gpt.build(size, "cuda")

    def loss(call: Any, data: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return call(**data)["loss"]

    step: Any = ts.make_step(
        ts.module_loss(model, loss),
        ts.optim.adamw(weight_decay=DECAY),
        schedule=ts.schedules.linear(LR, FOREVER),
        transforms=(ts.transforms.clip_by_global_norm(CLIP),),
        microbatches=accumulation,
    )
    state = step.init(model)
    lowerings = {
        "donate": ts.donate,
        "compile": ts.compile,
        "compile_whole": partial(ts.compile, whole=True),
        "capture": ts.capture,
    }
    for name in lower:
        step = lowerings[name](step)
    batch = {n: t.cuda().repeat(accumulation, 1) for n, t in gpt.batch(size).items()}
    gate = make_gate()
    while True:
        state, _ = step(state, batch)
        gate()


class Tokens:
    """Random tokens in memory; one sample is (length + 1,) int64."""

    deterministic = True

    def __init__(self, size: gpt.Size) -> None:
        import torch

        draws = torch.Generator().manual_seed(1)
        shape = (size.batch * 64, size.length + 1)
        self.rows = torch.randint(size.vocabulary, shape, generator=draws)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self.rows[index, :-1], "labels": self.rows[index, 1:]}


def run_trainer(
    size: gpt.Size,
    make_gate: MakeGate,
    accumulation: int,
    library: str,
    device: str = "cuda",
    **options: Any,
) -> None:
    """Train with a Trainer of ours or of transformers: the same script but for the import."""
    if library == "hf":
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import Trainer, TrainerCallback, TrainingArguments
    else:
        from trainer import Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        same_on_all_ranks = True  # it sets no switch, so ranks need not tell each other of it
        gate: Callable[[], None]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.gate = make_gate()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.gate()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=accumulation,
            max_steps=FOREVER,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=True,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        model = gpt.build(size, device)
        Trainer(model, arguments, train_dataset=Tokens(size), callbacks=[Turn()]).train()


def run_lightning(size: gpt.Size, make_gate: MakeGate, accumulation: int) -> None:
    """Train with Lightning."""
    import torch

    try:
        import lightning
    except ImportError:
        import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt.build(size, "cuda")
            self.gate: Any = None

        def on_train_start(self) -> None:
            self.gate = make_gate()

        def training_step(self, data: Any, index: int) -> Any:
            return self.model(**data)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), LR, weight_decay=DECAY, fused=True)

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.gate()

    lightning.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=FOREVER,
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), torch.utils.data.DataLoader(Tokens(size), size.batch, shuffle=True))


def contender(side: str, size: gpt.Size, accumulation: int) -> Callable[[MakeGate], None]:
    """Return the function that trains as ``side`` does.

    It makes a gate when all is ready for the first step, and calls that after every step.
    """
    lower = {
        "step": ("donate",),
        "step_captured": ("capture",),
        "step_compiled": ("compile", "donate"),
        "step_both": ("compile", "capture"),
        "step_whole": ("compile_whole", "capture"),
    }
    options: dict[str, dict[str, Any]] = {
        "trainer_off": {"library": "ours", "capture": "off"},
        "trainer": {"library": "ours"},
        "trainer_compiled": {"library": "ours", "torch_compile": True},
        "hf": {"library": "hf"},
        "hf_compiled": {"library": "hf", "torch_compile": True},
    }
    if side in lower:
        return lambda make_gate: run_step(size, make_gate, accumulation, lower[side])
    if side in options:
        return lambda make_gate: run_trainer(size, make_gate, accumulation, **options[side])
    if side == "lightning":
        return lambda make_gate: run_lightning(size, make_gate, accumulation)
    return lambda make_gate: run_loop(size, make_gate, accumulation, side == "loop_compiled")


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


def versions() -> dict[str, str]:
    """Return what was measured, and on what."""
    import torch

    found = {"device": torch.cuda.get_device_name(), "python": platform.python_version()}
    script = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    for package in ("torch", "transformers", "accelerate", "pytorch-lightning", "jax"):
        run = subprocess.run(
            [sys.executable, "-c", script, package], capture_output=True, text=True, check=False
        )
        if run.returncode == 0:
            found[package] = run.stdout.strip()
    return found


def main() -> None:
    """Measure all contenders at all sizes and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=gpt.SIZES, default=["small", "124M"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches to an update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, name, accumulation = options.work
        work(side, name, int(accumulation))
        return
    about = versions()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {"about": about, "accumulation": options.accumulation}
    peak = next((value for name, value in PEAK.items() if name in about["device"]), None)
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
