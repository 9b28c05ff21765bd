"""Train a byte-level GPT on CPython's own documentation, through Trainer. `make train` runs this.

    python examples/char_lm.py [--steps 600] [--out runs/char_lm] [--resume]

Kill it at any moment and start it again with --resume: it ends with the same digest.
"""

import argparse
import json
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainstep as ts
from trainer import Trainer, TrainingArguments

VOCABULARY = 256  # bytes


def corpus() -> bytes:
    """Return the text of Python's help topics, about 465 kB of English, as bytes."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


class Windows(torch.utils.data.Dataset):
    """Windows of ``length`` bytes, one beginning at every ``stride``-th byte of a text."""

    deterministic = True  # draws no random numbers, so the loader need not seed each sample

    def __init__(self, text: bytes, length: int, stride: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.length, self.stride = length, stride

    def __len__(self) -> int:
        return (len(self.bytes) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.stride
        window = self.bytes[start : start + self.length + 1]
        return {"input_ids": window[:-1], "labels": window[1:]}


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(_shifted(self.attention_norm(x))).view(heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, time, width)))
        return x + self.dropout(self.down(F.relu(self.up(self.mlp_norm(x))).square()))


def _shifted(x: Tensor) -> Tensor:
    """Let half of the channels show the byte before: pairs of bytes are then learned in no time."""
    before, own = x.chunk(2, dim=-1)
    return torch.cat([F.pad(before, (0, 0, 1, 0))[:, :-1], own], dim=-1)


class ByteGPT(nn.Module):
    """A GPT over bytes. Returns ``{"loss", "logits"}``."""

    def __init__(
        self, length: int, width: int = 128, layers: int = 4, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.tokens(input_ids) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Return ``prompt`` continued by ``count`` bytes, drawn with a generator of their own."""
        draws = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(ids[:, -self.length :])["logits"][0, -1] / temperature
            ids = torch.cat(
                [ids, torch.multinomial(logits.softmax(-1), 1, generator=draws)[None]], 1
            )
        return bytes(ids[0].tolist())


def unigram_entropy(train: bytes, held_out: bytes) -> float:
    """Return nats per byte that the byte frequencies of ``train`` need for ``held_out``."""
    counts = Counter(train)
    total = len(train) + VOCABULARY  # add-one smoothing
    return -sum(math.log((counts[b] + 1) / total) for b in held_out) / len(held_out)


def zlib_entropy(text: bytes) -> float:
    """Return nats per byte of ``text`` compressed by zlib at level 9."""
    return len(zlib.compress(text, 9)) * 8 * math.log(2) / len(text)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="updates in the whole run")
    parser.add_argument("--out", type=Path, default=Path("runs/char_lm"), help="output folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and dropout")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=24, help="windows in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches to an update")
    parser.add_argument("--length", type=int, default=96, help="bytes in a window")
    parser.add_argument("--width", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout probability")
    parser.add_argument("--eval-steps", type=int, default=100, help="updates between evaluations")
    parser.add_argument("--save-steps", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--sample", type=int, default=300, help="bytes of text to generate")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def arguments(options: argparse.Namespace) -> TrainingArguments:
    """Turn the command line into training arguments."""
    return TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(60, options.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, options.eval_steps // 3),
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        enable_jit_checkpoint=True,  # Ctrl-C and SIGTERM save, then end with status 75
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=options.quiet,
    )


def main() -> None:
    """Train, evaluate, and show what was learned."""
    options = parse()
    text = corpus()
    cut = len(text) * 9 // 10
    train, held_out = text[:cut], text[cut:]
    torch.manual_seed(options.seed)
    model = ByteGPT(options.length, options.width, options.layers, dropout=options.dropout)
    trainer = Trainer(
        model,
        arguments(options),
        train_dataset=Windows(train, options.length, stride=1),
        eval_dataset=Windows(held_out, options.length, stride=options.length),
    )
    print(
        f"{len(train):,} bytes to train on, {len(held_out):,} held out; "
        f"{trainer.get_num_trainable_parameters():,} parameters"
    )
    trainer.train(resume_from_checkpoint=has_checkpoint(options.out) if options.resume else None)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    print(loss_table(trainer.state.log_history))
    rivals = {
        "unigram model": unigram_entropy(train, held_out),
        "zlib -9, whole text": zlib_entropy(text),
        "zlib -9, this tenth": zlib_entropy(held_out),
        "this model": loss,
    }
    print(f"\n{'on the held-out tenth':24}{'nats per byte':>14}{'bits per byte':>15}")
    for name, nats in rivals.items():
        print(f"{name:24}{nats:14.3f}{nats / math.log(2):15.3f}")
    if options.sample:
        model.eval()
        sample = model.generate(b"The ", options.sample, seed=options.seed)
        print(f"\nA sample:\n{sample.decode(errors='replace')}")
    plot(trainer.state.log_history, rivals, options.out / "loss.png")
    digest = ts.digest(trainer.train_state)
    result = {"digest": digest, "eval_loss": loss, "step": trainer.state.global_step}
    (options.out / "result.json").write_text(json.dumps(result, indent=2))
    print(f"\ndigest of the final state: {digest}")


def has_checkpoint(folder: Path) -> bool | None:
    """Tell Trainer to resume if there is a checkpoint; a run killed before its first starts anew."""
    return any(folder.glob("checkpoint-*")) or None


def loss_table(history: list[dict[str, Any]]) -> str:
    """Lay the logged losses out as a table, one line per evaluated step."""
    rows: dict[int, str] = {}
    train: float | None = None
    for record in history:
        train = record.get("loss", train)
        if "eval_loss" in record and train is not None:
            rows[record["step"]] = f"{record['step']:6}{train:12.3f}{record['eval_loss']:15.3f}"
    return "\n".join([f"\n{'step':>6}{'train loss':>12}{'held-out loss':>15}", *rows.values()])


def plot(history: list[dict[str, Any]], rivals: dict[str, float], path: Path) -> None:
    """Draw the loss curve, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture (pip install 'trainstep[plot]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held-out text")):
        points = [(record["step"], record[key]) for record in history if key in record]
        axes.plot(*zip(*points, strict=True), label=label, marker="." if "eval" in key else "")
    for name, style in (("unigram model", ":"), ("zlib -9, this tenth", "--")):
        axes.axhline(rivals[name], color="gray", linestyle=style, label=name)
    axes.set(
        xlabel="update", ylabel="nats per byte", title="Byte-level GPT on Python's help topics"
    )
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
