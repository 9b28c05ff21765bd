"""What changing the import does to a script that fine-tunes a model of transformers on a GPU.

    python benchmarks/fine_tune.py [--models mini base gpt2] [--sides ...]

Encoders learn to classify, GPT-2 to predict the next token; samples are padded to one length, and two
thirds of them hide tokens. bfloat16 autocast, fused AdamW, clipping at 1, a log every 50 steps. Weights are
random, which costs as much as others would.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import turns
from shared import at_least, need_cuda, versions

SIDES = {
    "hf": "Hugging Face Trainer",
    "trainer_off": "our Trainer, capture off",
    "trainer": "our Trainer",
    "hf_compiled": "Hugging Face Trainer, torch_compile",
    "trainer_compiled": "our Trainer, torch_compile",
}
MODELS = {
    "mini": "BERT of MiniLM's size (6 x 384), batch 32 x 128",
    "base": "BERT base (12 x 768), batch 32 x 128",
    "gpt2": "GPT-2 (12 x 768), batch 8 x 512",
}
SHAPES = {"mini": (32, 128), "base": (32, 128), "gpt2": (8, 512)}
STEPS = 30


def build(name: str) -> Any:
    """Return a model with random weights, on the GPU."""
    import transformers

    if name == "gpt2":
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).cuda()
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    config = transformers.BertConfig(**(sizes if name == "mini" else {}), num_labels=4)
    return transformers.BertForSequenceClassification(config).cuda()


def samples(name: str) -> list[dict[str, Any]]:
    """Return padded samples, of which every third has the full length."""
    import torch

    batch, length = SHAPES[name]
    draws = torch.Generator().manual_seed(1)
    found = []
    for number in range(batch * 32):
        ids = torch.randint(1000, 30000, (length,), generator=draws)
        mask = torch.ones(length, dtype=torch.int64)
        if number % 3:
            mask[length - 1 - number % (length // 2) :] = 0
        labels = torch.where(mask == 1, ids, -100) if name == "gpt2" else torch.tensor(number % 4)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def work(side: str, name: str) -> None:
    """Be one contender."""
    import torch

    from gpu_sides import train_forever

    torch.set_float32_matmul_precision("high")
    wait, rest = torch.cuda.synchronize, torch.cuda.empty_cache
    train_forever(
        "hf" if side.startswith("hf") else "ours",
        build(name),
        samples(name),
        SHAPES[name][0],
        lambda: turns.Gate(STEPS, 3, 12, wait, rest, waits=True),
        **({"torch_compile": True} if side.endswith("compiled") else {}),
        **({"capture": "off"} if side == "trainer_off" else {}),
    )


def main() -> None:
    """Measure all contenders with all models and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    need_cuda()
    about = versions("cuda")
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {"about": about}
    for name in options.models:
        commands = {
            side: [sys.executable, __file__, "--work", side, name] for side in options.sides
        }
        times = turns.compete(commands, options.rounds, SIDES, together=True, patience=300)
        results[name] = times
        if options.json:
            options.json.write_text(json.dumps(results, indent=2))
        print(f"\n### {MODELS[name]}\n\n{turns.table(times, SIDES, 'hf')}", flush=True)


if __name__ == "__main__":
    main()
