"""What our loader costs beside PyTorch's, what seeding every sample costs, and seeking. On the CPU.

    python benchmarks/loader.py [--workers 0 2] [--rounds 7] [--json FILE]

Both loaders read the same dataset with the same collator, an epoch at a time, in alternating order; ours is
that of ``Trainer``, read as training reads it. Workers are kept from epoch to epoch, so that their start is
not timed. Reported are medians, their spread, and ratios of the rounds that ran side by side. What seeding
costs is taken from the processor's time of many short turns, so that other processes matter little.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from shared import at_least
from trainer import Trainer, TrainingArguments
from trainer.data.feed import Feed

OURS, THEIRS = "ours", "torch.utils.data.DataLoader"
Passes = dict[str, Callable[[], Iterable[Any]]]
"""For every side, what makes a pass over the data."""


class Augmented:
    """Images (3, size, size) with a random crop, a random flip and noise: draws three times a sample."""

    def __init__(self, n: int, size: int, deterministic: bool = False) -> None:
        self.images = torch.rand(64, 3, size + 8, size + 8)
        self.n, self.size = n, size
        self.deterministic = deterministic  # that is: not to be seeded

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index % 64]
        top, left = torch.randint(0, 8, (2,)).tolist()
        image = image[:, top : top + self.size, left : left + self.size]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return {"x": image + 0.1 * torch.randn(1), "labels": torch.tensor(index % 10)}


class Huge:
    """A dataset of 10**9 samples that are made when they are asked for."""

    deterministic = True

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([float(index)])}


def rows(n: int) -> list[dict[str, Tensor]]:
    """Return samples in memory: 128 tokens each."""
    tokens = torch.randint(50_000, (n, 128))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_for(dataset: Any, workers: int, batch: int, **options: Any) -> Trainer:
    """Make a Trainer, for its loader."""
    if workers:
        options |= {"dataloader_persistent_workers": True}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="loader-"),
        per_device_train_batch_size=batch,
        dataloader_num_workers=workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(nn.Linear(1, 1), arguments, default_collate, dataset)
    shutil.rmtree(str(arguments.output_dir))  # nothing is trained
    return trainer


def ours(dataset: Any, workers: int, batch: int, **options: Any) -> Callable[[], Iterable[Any]]:
    """Return what makes one pass after the other over our loader, as training does."""
    feed = Feed(trainer_for(dataset, workers, batch, **options).get_train_dataloader())
    epochs = iter(range(10**9))
    return lambda: feed(next(epochs), 0)


def theirs(dataset: Any, workers: int, batch: int) -> Callable[[], Iterable[Any]]:
    """Return what makes a pass over PyTorch's loader."""
    loader = DataLoader(
        dataset,
        batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=default_collate,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)


def compare(
    passes: Passes, samples: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return samples a second of every side, round by round, in alternating order."""
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        order = list(passes) if number % 2 else list(reversed(passes))
        for name in order:
            began = clock()
            for _ in passes[name]():
                pass
            if number:  # the first round starts workers and warms up
                speeds[name].append(samples / (clock() - began))
    return speeds


def ratio(values: list[float], base: list[float]) -> float:
    """Return the median of the ratios of rounds side by side."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def report(title: str, speeds: dict[str, list[float]], base: str) -> None:
    """Print a Markdown table with ratios to ``base``; more is better."""
    print(f"\n### {title}\n\n| | samples/s (median) | min to max | of {base} |\n|---|---|---|---|")
    for name, values in speeds.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        share = ratio(values, speeds[base])
        print(f"| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {share:.3f} |", flush=True)


class Rows:
    """Samples that are there already, to be seeded or not."""

    def __init__(self, rows: list[Any], deterministic: bool) -> None:
        self.rows, self.deterministic = rows, deterministic

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def seeding(batch: int, size: int, turns: int = 60, samples: int = 1024) -> dict[str, Any]:
    """Measure what seeding a sample takes, without workers: of data that draw nothing, and of images."""
    there = rows(samples)
    cases: dict[str, Callable[[bool], Any]] = {
        "draws nothing": lambda deterministic: Rows(there, deterministic),
        "augmented images": lambda deterministic: Augmented(samples, size, deterministic),
    }
    found: dict[str, Any] = {}
    print("\n### Seeding every sample, µs of the processor\n")
    print("| | seeded | not seeded | seeding: of the fastest turns | median of differences |")
    print("|---|---|---|---|---|")
    for name, make in cases.items():
        passes = {
            "seeded": ours(make(False), 0, batch),
            "not seeded": ours(make(True), 0, batch),
        }
        speeds = compare(passes, samples, turns, time.process_time)
        seeded, plain = ([1e6 / speed for speed in values] for values in speeds.values())
        least = min(seeded) - min(plain)
        middle = statistics.median(a - b for a, b in zip(seeded, plain, strict=True))
        found[name] = {"seeded": seeded, "not seeded": plain}
        print(
            f"| {name} | {min(seeded):.1f} | {min(plain):.1f} | {least:.1f} | {middle:.1f} |",
            flush=True,
        )
    return found


def seeking(rounds: int) -> dict[str, list[float]]:
    """Measure how long the first batch takes from the middle of 10**9 samples, and an index."""
    loader: Any = trainer_for(
        Huge(), 0, 32, train_sampling_strategy="feistel", max_steps=1
    ).get_train_dataloader()
    order = loader.batch_sampler.order
    found: dict[str, list[float]] = {"first batch, from the middle, ms": [], "an index, µs": []}
    for number in range(rounds + 1):
        feed = Feed(loader)
        began = time.perf_counter()
        next(iter(feed(number, 10**9 // 64)))
        first = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        order.indices(number, 10**8, 10**8 + 4096)
        if number:
            found["first batch, from the middle, ms"].append(first)
            found["an index, µs"].append((time.perf_counter() - began) * 1e6 / 4096)
    print('\n### 10**9 samples, train_sampling_strategy="feistel"\n')
    print("| | median | min to max |\n|---|---|---|")
    for name, values in found.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return found


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--samples", type=int, default=20_000, help="of an epoch in memory")
    parser.add_argument("--images", type=int, default=4_000, help="of an epoch of augmented images")
    parser.add_argument("--size", type=int, default=64, help="width of an image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{where}, batches of {options.batch}")
    results: dict[str, Any] = {"machine": where, "batch": options.batch}
    data = {
        "a list of tokens in memory": (rows(options.samples), options.samples),
        "augmented images": (Augmented(options.images, options.size), options.images),
    }
    for what, (dataset, samples) in data.items():
        for workers in options.workers:
            passes = {
                OURS: ours(dataset, workers, options.batch),
                THEIRS: theirs(dataset, workers, options.batch),
            }
            speeds = compare(passes, samples, options.rounds)
            report(f"{what.capitalize()}, {workers} workers", speeds, THEIRS)
            results[f"{what}, {workers} workers"] = speeds
    results["seeding"] = seeding(options.batch, options.size)
    results["seeking"] = seeking(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
