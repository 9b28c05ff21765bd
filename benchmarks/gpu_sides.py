"""Who is measured on a GPU: loops written by hand, the pure step, Trainers of three libraries."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import gpt
from shared import import_lightning

LR, DECAY, CLIP = 3e-4, 0.1, 1.0
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
    """Train a GPT with a Trainer of ours or of transformers."""
    train_forever(
        library,
        gpt.build(size, device),
        Tokens(size),
        size.batch,
        make_gate,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        **options,
    )


def train_forever(
    library: str, model: Any, samples: Any, batch: int, make_gate: MakeGate, **options: Any
) -> None:
    """Train with a Trainer of ours or of transformers: the same script but for the import."""
    if library == "hf":
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import Trainer, TrainerCallback, TrainingArguments
    else:
        from trainer import Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        same_on_all_ranks = True  # it sets no switch, so ranks need not tell each other of it
        leaves_model_alone = True  # so that nobody looks whether it has changed something
        gate: Callable[[], None]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.gate = make_gate()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.gate()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=FOREVER,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=True,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        Trainer(model, arguments, train_dataset=samples, callbacks=[Turn()]).train()


def run_lightning(size: gpt.Size, make_gate: MakeGate, accumulation: int) -> None:
    """Train with Lightning."""
    import torch

    lightning = import_lightning()

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
