"""What a training step costs: plain loop, the pure step, our Trainer, other trainers. On the CPU.

    python benchmarks/overhead.py [--models mlp gpt] [--sides loop step trainer hf] [--rounds 9]

Every side trains the same model on the same data, in turns (see ``turns.py``). Reported are medians over
the rounds, their spread, and the ratio to the plain loop.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns
from shared import at_least, import_lightning, versions

SIDES = {
    "loop": "plain PyTorch loop",
    "step": "pure step, donated",
    "pure": "pure step, not donated",
    "compiled": "pure step, donated, compiled",
    "trainer": "our Trainer",
    "trainer_compiled": "our Trainer, torch_compile",
    "hf": "Hugging Face Trainer",
    "lightning": "Lightning Trainer",
}
MODELS = {"mlp": (64, 200), "gpt": (16, 25)}  # batch size, steps in a turn
LR, DECAY, CLIP, LOG_EVERY = 1e-3, 0.1, 1.0, 10


def build(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return a model that takes the data's keys and returns ``{"loss": ...}``, and its samples."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "gpt":
        sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
        from char_lm import ByteGPT

        tokens = torch.randint(256, (512, 97))
        samples = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]
        return ByteGPT(96, width=128, layers=4, dropout=0.0), samples

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(256, 10))

        def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
            return {"loss": nn.functional.cross_entropy(self.net(inputs), labels)}

    inputs, labels = torch.randn(2048, 64), torch.randint(10, (2048,))
    return Classifier(), [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def run_loop(model: Any, samples: Any, batch: int, total: int, gate: Callable[[], None]) -> None:
    """Train as one writes it by hand."""
    import torch

    loader = torch.utils.data.DataLoader(samples, batch, shuffle=True)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LR, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / total)
    model.train()
    step, summed = 0, torch.zeros(())
    while step < total:
        for data in loader:
            loss = model(**data)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            summed += loss.detach()
            step += 1
            if step % LOG_EVERY == 0:
                summed.item()
                summed = torch.zeros(())
            gate()
            if step == total:
                break


def run_step(
    model: Any, samples: Any, batch: int, total: int, gate: Callable[[], None], kind: str
) -> None:
    """Train with the pure step, in one of its lowerings."""
    import torch

    import trainstep as ts

    loader = torch.utils.data.DataLoader(samples, batch, shuffle=True)
    optimizer = ts.optim.partition(
        {r"weight$": "decay", "": "rest"},
        {"decay": ts.optim.adamw(weight_decay=DECAY), "rest": ts.optim.adamw(weight_decay=0.0)},
    )
    step = ts.make_step(
        ts.module_loss(model, lambda call, data: call(**data)["loss"]),
        optimizer,
        schedule=ts.schedules.linear(LR, total),
        transforms=(ts.transforms.clip_by_global_norm(CLIP),),
    )
    state = step.init(model.train())
    if kind == "compiled":
        step = ts.compile(step)
    if kind != "pure":
        step = ts.donate(step)
    summed = torch.zeros(())
    while state.step < total:
        for data in loader:
            state, metrics = step(state, data)
            summed += metrics["loss"]
            if state.step % LOG_EVERY == 0:
                summed.item()
                summed = torch.zeros(())
            gate()
            if state.step == total:
                break


def run_trainer(
    model: Any,
    samples: Any,
    batch: int,
    total: int,
    gate: Callable[[], None],
    library: str,
    **options: Any,
) -> None:
    """Train with a Trainer of ours or of transformers: the same script but for the import."""
    if library == "hf":
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import Trainer, TrainerCallback, TrainingArguments
    else:
        from trainer import Trainer, TrainerCallback, TrainingArguments

    class Gate(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=total,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=False,
            **options,
        )
        Trainer(model, arguments, train_dataset=samples, callbacks=[Gate()]).train()


def run_lightning(
    model: Any, samples: Any, batch: int, total: int, gate: Callable[[], None]
) -> None:
    """Train with Lightning."""
    import torch

    lightning = import_lightning()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, data: Any, index: int) -> Any:
            return self.model(**data)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), LR, weight_decay=DECAY, fused=True)

    class Gate(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            gate()

    lightning.Trainer(
        accelerator="cpu",
        max_steps=total,
        gradient_clip_val=CLIP,
        callbacks=[Gate()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(Module(), torch.utils.data.DataLoader(samples, batch, shuffle=True))


def work(side: str, model_name: str, rounds: int) -> None:
    """Be one side."""
    import torch

    torch.set_num_threads(2)
    batch, turn = MODELS[model_name]
    model, samples = build(model_name)
    gate = turns.Gate(turn)
    total = turn * (rounds + 2)
    if side == "loop":
        run_loop(model, samples, batch, total, gate)
    elif side in ("step", "pure", "compiled"):
        run_step(model, samples, batch, total, gate, side)
    elif side == "lightning":
        run_lightning(model, samples, batch, total, gate)
    elif side == "trainer_compiled":
        run_trainer(model, samples, batch, total, gate, "trainer", torch_compile=True)
    else:
        run_trainer(model, samples, batch, total, gate, side)


def main() -> None:
    """Measure all sides on all models and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, model, rounds = options.work
        work(side, model, int(rounds))
        return
    about = versions("cpu")
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {"about": about}
    for model in options.models:
        commands = {
            side: [sys.executable, __file__, "--work", side, model, str(options.rounds)]
            for side in options.sides
        }
        times = turns.compete(commands, options.rounds, SIDES)
        print(f"\n### {model}, batch {MODELS[model][0]}, {os.cpu_count()} cores\n")
        print(turns.table(times, SIDES, "loop"))
        results[model] = times
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
