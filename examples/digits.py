"""Classify handwritten digits with a small convolutional net, and stop when it no longer improves.

    python examples/digits.py [--epochs 60] [--out runs/digits] [--resume]

Shows a plain ``nn.Module``, random augmentation in the dataset, ``compute_metrics``, early stopping
and the best weights at the end. Needs scikit-learn for its 1,797 scanned digits of 8 x 8 pixels.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainstep as ts
from trainer import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

CLASSES = 10


class Digits(torch.utils.data.Dataset):
    """Images (1, 8, 8) between 0 and 1 with their classes, each moved at random when it is read.

    The shift is drawn from PyTorch's global generator, as augmentations usually are. The trainer
    seeds it for every sample, so that a resumed run, or one with workers, sees the same pictures.
    """

    def __init__(self, images: Tensor, classes: Tensor, shift: int = 0) -> None:
        self.images, self.classes, self.shift = images, classes, shift
        self.deterministic = shift == 0  # then the loader need not seed each sample

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.shift:
            down, right = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            height, width = image.shape[-2:]
            padded = F.pad(image, [self.shift] * 4)
            image = padded[:, down : down + height, right : right + width]
        return {"images": image, "labels": self.classes[index]}


def splits(shift: int, seed: int = 0) -> tuple[Digits, Digits, Digits]:
    """Return training, validation and held-out digits; only the first are shifted.

    The split has a seed of its own: other weights are still judged by the same digits.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, validation, held_out = order[600:], order[:300], order[300:600]
    targets = torch.tensor(classes)
    return (
        Digits(images[train], targets[train], shift),
        Digits(images[validation], targets[validation]),
        Digits(images[held_out], targets[held_out]),
    )


class ConvNet(nn.Module):
    """Two convolutions, a pool, and a linear layer. Returns ``{"loss", "logits"}``."""

    def __init__(self, width: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(2 * width * 16, CLASSES)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.features(images))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose highest logit is that of their class."""
    return {"accuracy": (outcome.predictions.argmax(-1) == outcome.label_ids).mean()}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60, help="passes over the data, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="output folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and shifts")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch")
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--dropout", type=float, default=0.25, help="dropout probability")
    parser.add_argument("--shift", type=int, default=1, help="pixels to move an image by, at most")
    parser.add_argument("--patience", type=int, default=6, help="epochs to wait for a better one")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def arguments(options: argparse.Namespace) -> TrainingArguments:
    """Turn the command line into training arguments."""
    return TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=300,
        dataloader_num_workers=options.workers,
        learning_rate=options.lr,
        lr_scheduler_type="constant",  # early stopping says when it is enough
        weight_decay=0.05,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        # Resuming then remembers for how many epochs there was no improvement.
        restore_callback_states_from_checkpoint=True,
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=options.quiet,
    )


def main() -> None:
    """Train until the validation loss stops falling, then look at the held-out digits."""
    options = parse()
    train, validation, held_out = splits(options.shift)
    torch.manual_seed(options.seed)
    trainer = Trainer(
        ConvNet(options.width, options.dropout),
        arguments(options),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=options.patience)],
    )
    print(
        f"{len(train):,} digits to train on, {len(validation)} to choose the epoch by, "
        f"{len(held_out)} held out; {trainer.get_num_trainable_parameters():,} parameters"
    )
    trainer.train(resume_from_checkpoint=has_checkpoint(options.out) if options.resume else None)
    outcome = trainer.predict(held_out)
    trainer.save_model()
    trainer.save_state()
    print(epoch_table(trainer.state.log_history))
    print(confusion_table(outcome.label_ids.tolist(), outcome.predictions.argmax(-1).tolist()))
    score, best = (outcome.metrics or {})["test_accuracy"], trainer.state.best_global_step
    print(f"\naccuracy on the held-out digits, with the best weights (step {best}): {score:.4f}")
    digest = ts.digest(trainer.train_state)
    result = {"digest": digest, "accuracy": score, "step": trainer.state.global_step, "best": best}
    (options.out / "result.json").write_text(json.dumps(result, indent=2))
    print(f"digest of the final state: {digest}")


def has_checkpoint(folder: Path) -> bool | None:
    """Tell Trainer to resume if there is a checkpoint; a run killed before its first starts anew."""
    return any(folder.glob("checkpoint-*")) or None


def epoch_table(history: list[dict[str, Any]]) -> str:
    """Lay the log out as a table, one line per epoch."""
    rows = [f"\n{'epoch':>5}{'train loss':>12}{'validation loss':>17}{'accuracy':>10}"]
    train = float("nan")
    for record in history:
        train = record.get("loss", train)
        if "eval_loss" in record:
            loss, score = record["eval_loss"], record["eval_accuracy"]
            rows.append(f"{record['epoch']:5.0f}{train:12.4f}{loss:17.4f}{score:10.4f}")
    return "\n".join(rows)


def confusion_table(labels: list[int], guesses: list[int]) -> str:
    """Count the pairs of class and guess; a dot stands for none."""
    counts = Counter(zip(labels, guesses, strict=True))
    rows = ["\ndigit | read as" + "".join(f"{guess:4}" for guess in range(CLASSES))]
    for label in range(CLASSES):
        cells = "".join(f"{counts[label, guess] or '.':>4}" for guess in range(CLASSES))
        rows.append(f"{label:5} |        {cells}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
