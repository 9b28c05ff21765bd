"""What a data-parallel step costs and sends: DDP by hand, the pure step, exact sums, our Trainer, others.

    python benchmarks/distributed.py [--models mlp gpt] [--sides ddp pure exact trainer] [--rounds 7]

Every side is two processes on this machine's CPU, one thread each, that exchange through gloo and share a
global batch. Sides take turns (see ``turns.py``). The bytes that rank 0 sent in a step are counted by the
kernel (see ``wire.py``) and printed beside the formula (see ``traffic.py``).
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import overhead
import traffic
import turns
import wire
from shared import at_least

SIDES = {
    "ddp": "DDP, written by hand",
    "pure": "data_parallel, donated",
    "exact": "data_parallel(exact=True), donated",
    "trainer": "our Trainer, DDP",
    "trainer_unused": "our Trainer, DDP that looks for unused parameters",
    "trainer_exact": "our Trainer, exact_reduction",
    "hf": "Hugging Face Trainer, DDP",
}
MODELS = {"mlp": (64, 200), "gpt": (16, 25)}  # global batch size, steps in a turn
RANKS, WARM = 2, 3


class Gate:
    """What every rank calls after a step: rank 0 waits for its turn, the others for rank 0."""

    def __init__(self, steps: int, rank: int, report: Path) -> None:
        self._steps, self._report = steps, report
        self._gate = turns.Gate(steps, warm=WARM, first=steps + WARM) if rank == 0 else None
        self._left = steps + WARM
        self._before: int | None = None

    def __call__(self) -> None:
        """Count a step."""
        import torch.distributed as dist

        self._left -= 1
        if self._left == self._steps and self._gate is not None and not self._report.exists():
            self._before = wire.sent()
        if self._left == 0 and self._before is not None:
            each = (wire.sent() - self._before) / self._steps
            self._report.write_text(json.dumps(each))
            self._before = None
        if self._gate is not None:
            self._gate()
        if self._left == 0:
            dist.barrier()
            self._left = self._steps + WARM


def run_ddp(model: Any, samples: Any, batch: int, total: int, gate: Callable[[], None]) -> None:
    """Train as one writes it by hand."""
    import torch

    loader, sampler = batches(samples, batch)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), overhead.LR, fused=True)
    step = 0
    while step < total:
        sampler.set_epoch(step)
        for data in loader:
            loss = wrapped(**data)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), overhead.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % overhead.LOG_EVERY == 0:
                loss.item()
            gate()
            if step == total:
                break


def run_pure(
    model: Any, samples: Any, batch: int, total: int, gate: Callable[[], None], exact: bool
) -> None:
    """Train with the pure step."""
    import trainstep as ts

    loader, sampler = batches(samples, batch)
    step = ts.make_step(
        ts.module_loss(model, lambda call, data: call(**data)["loss"]),
        ts.optim.adamw(overhead.LR),
        transforms=(ts.transforms.clip_by_global_norm(overhead.CLIP),),
    )
    parallel = ts.data_parallel(ts.donate(step), exact=exact)
    state = parallel.init(model.train())
    while state.step < total:
        sampler.set_epoch(state.step)
        for data in loader:
            state, metrics = parallel(state, data)
            if state.step % overhead.LOG_EVERY == 0:
                metrics["loss"].item()
            gate()
            if state.step == total:
                break


def batches(samples: Any, batch: int) -> tuple[Any, Any]:
    """Return this rank's loader of a global batch, and its sampler."""
    import torch

    sampler: Any = torch.utils.data.distributed.DistributedSampler(samples, drop_last=True)
    return torch.utils.data.DataLoader(samples, batch // RANKS, sampler=sampler), sampler


def run_trainer(
    model: Any,
    samples: Any,
    batch: int,
    total: int,
    gate: Callable[[], None],
    library: str,
    **more: Any,
) -> None:
    """Train with a Trainer of ours or of transformers."""
    if library == "hf":
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import Trainer, TrainerCallback, TrainingArguments
    else:
        from trainer import Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        same_on_all_ranks = (
            True  # it steers nothing, so our Trainer need not ask what it did elsewhere
        )

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch // RANKS,
            max_steps=total,
            learning_rate=overhead.LR,
            lr_scheduler_type="constant",
            max_grad_norm=overhead.CLIP,
            logging_steps=overhead.LOG_EVERY,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **more,
        )
        Trainer(model, arguments, train_dataset=samples, callbacks=[Turn()]).train()


def launch(arguments: list[str]) -> None:
    """Become rank 0, and start the other ranks; they end when rank 0 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ |= shared | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for rank in range(1, RANKS):
        subprocess.Popen(
            [sys.executable, __file__, "--work", *arguments],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}


def work(side: str, model_name: str, rounds: int, report: Path) -> None:
    """Be one rank of one side."""
    if "RANK" not in os.environ:
        launch([side, model_name, str(rounds), str(report)])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    batch, turn = MODELS[model_name]
    model, samples = overhead.build(model_name)
    gate = Gate(turn, rank, report)
    total = (turn + WARM) * (rounds + 2)
    if side in ("ddp", "pure", "exact"):
        dist.init_process_group("gloo")
    if side == "ddp":
        run_ddp(model, samples, batch, total, gate)
    elif side in ("pure", "exact"):
        run_pure(model, samples, batch, total, gate, side == "exact")
    elif side == "hf":
        run_trainer(model, samples, batch, total, gate, "hf", ddp_find_unused_parameters=False)
    else:
        more = {
            "trainer": {"ddp_find_unused_parameters": False},  # as DDP does by itself
            "trainer_unused": {},
            "trainer_exact": {"exact_reduction": True},
        }
        run_trainer(model, samples, batch, total, gate, "ours", **more[side])


def formula(side: str, size: int) -> float:
    """Return the bytes that a step should send, of ``size`` bytes of gradients."""
    exact = side in ("exact", "trainer_exact")
    return traffic.exact_sent(size, RANKS) if exact else traffic.ddp_sent(size, RANKS)


def measure(model: str, sides: list[str], rounds: int) -> dict[str, Any]:
    """Let the sides take turns on one model, and print what they cost."""
    with tempfile.TemporaryDirectory() as folder:
        reports = {side: Path(folder) / f"{side}.json" for side in sides}
        commands = {
            side: [sys.executable, __file__, "--work", side, model, str(rounds), str(reports[side])]
            for side in sides
        }
        times = turns.compete(commands, rounds, SIDES)
        counted = {side: json.loads(reports[side].read_text()) for side in times}
    module, _ = overhead.build(model)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    print(f"\n### {model}, batch {MODELS[model][0]}, {RANKS} ranks, {os.cpu_count()} cores\n")
    print(turns.table(times, SIDES, "ddp"))
    print("\n| | bytes sent in a step | formula | ratio |\n|---|---|---|---|")
    for side, bytes_sent in counted.items():
        due = formula(side, size)
        print(f"| {SIDES[side]} | {bytes_sent:,.0f} | {due:,.0f} | {bytes_sent / due:.4f} |")
    return {"times": times, "bytes": counted}


def main() -> None:
    """Measure all sides on all models and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, model, rounds, report = options.work
        work(side, model, int(rounds), Path(report))
        return
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    for model in options.models:
        results[model] = measure(model, options.sides, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
