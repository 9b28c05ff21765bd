"""Runs that differ in data, randomness and features, to be interrupted and taken up again."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate

from support.shell import make_trainer, samples, scored
from trainer import TrainerCallback

ROWS, SIZE = 10, 2
"""Samples in an epoch, and in a micro-batch."""

AXES: dict[str, tuple[Any, ...]] = {
    "data": ("map", "grouped by length", "iterable with state", "iterable without"),
    "workers": (0, 2),
    "random": ("collator", "dataset"),
    "accumulation": (1, 3),
    "at": ("mid-epoch", "boundary", "second epoch"),
    "save": ("sync", "async"),
    "feature": ("ema", "loss scale", "skip guard"),
}
"""What a run may differ in, and where it is interrupted."""

LAST_STEP = {1: 12, 3: 5}
INTERRUPTED: dict[str, dict[int, int]] = {
    "mid-epoch": {1: 2, 3: 1},
    "boundary": {1: 5, 3: 2},
    "second epoch": {1: 8, 3: 3},
}
"""The step at which a run ends, and is interrupted, by the micro-batches to an update."""

Cell = dict[str, Any]


def name(cell: Cell) -> str:
    """A cell's values, as the name of a test or folder."""
    return "-".join(str(value).replace(" ", "_") for value in cell.values())


def all_cells(axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[Cell]:
    """Few combinations, such that every two values of two axes are together in one of them.

    Greedy: of 40 random combinations that hold a pair still missing, the one with most such pairs is taken.
    """
    draw = random.Random(seed)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in combinations(axes, 2)
        for x, y in product(axes[a], axes[b])
    }
    cells: list[Cell] = []
    while missing:
        wanted = min(missing, key=sorted_text)
        tries = [
            {axis: draw.choice(values) for axis, values in axes.items()} | dict(wanted)
            for _ in range(40)
        ]
        best = max(tries, key=lambda cell: len(missing & pairs(cell)))
        cells.append({axis: best[axis] for axis in axes})
        missing -= pairs(best)
    return cells


def pairs(cell: Cell) -> set[frozenset[tuple[str, Any]]]:
    """Every two values of a combination."""
    return {frozenset(two) for two in combinations(cell.items(), 2)}


def sorted_text(pair: frozenset[tuple[str, Any]]) -> str:
    """Orders pairs alike in every process."""
    return str(sorted(map(str, pair)))


# ---- data


def drawn() -> float:
    """A small number from the three global generators."""
    total = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
    return total / 10


class Rows:
    """Rows by index, with noise if they are random."""

    def __init__(self, rows: list[Any], noisy: bool) -> None:
        self.rows, self.noisy = rows, noisy
        self.deterministic = not noisy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return {**row, "x": row["x"] + drawn()} if self.noisy else row


class Streamed(IterableDataset):
    """The same without an index."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return map(self.rows.__getitem__, range(len(self.rows)))


class StreamedWithState(Streamed):
    """The same with a state; gives the rows in another order in each pass."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.done = self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        order = random.Random(self.passes).sample(range(len(self.rows)), len(self.rows))
        while self.done < len(order):
            self.done += 1
            yield self.rows[order[self.done - 1]]
        self.done, self.passes = 0, self.passes + 1

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done, self.passes = state["done"], state["passes"]


def noisy_collate(rows: list[Any]) -> Any:
    """A random collator."""
    batch = default_collate(rows)
    return {**batch, "x": batch["x"] + drawn()}


def plain_collate(rows: list[Any]) -> Any:
    """A collator that draws nothing."""
    return default_collate(rows)


# ---- runs


class AdamWithAverage(torch.optim.Adam):
    """Adam that keeps an exponential moving average of the parameters in its state.

    The Trainer has no option for an average; this is how a script has one.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", parameter.detach().clone())
                average.lerp_(parameter.detach(), 0.1)
        return loss


class SaveAtEpochEnd(TrainerCallback):
    """Saves at the end of every epoch, besides what the arguments ask for."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = True
        return control


def build(cell: Cell, folder: Path, seed: int = 0) -> Any:
    """Make the trainer of a cell.

    Args:
        cell: A value for each of ``AXES``; where it is interrupted does not matter.
        folder: Output folder.
        seed: Of the initial weights.
    """
    rows = [row | {"input_ids": [0] * (1 + 7 * i % 5)} for i, row in enumerate(samples(ROWS))]
    if cell["feature"] == "skip guard":  # one update an epoch is refused
        rows[3] = rows[3] | {"x": rows[3]["x"] / 0}
    data: Any = Rows(rows, noisy=cell["random"] == "dataset")
    if cell["data"].startswith("iterable"):
        data = (StreamedWithState if cell["data"].endswith("with state") else Streamed)(data)
    grouped = cell["data"] == "grouped by length"
    features: dict[str, dict[str, Any]] = {
        "ema": {},
        "loss scale": {"fp16": True},
        "skip guard": {"on_nonfinite": "skip", "logging_nan_inf_filter": False},
    }
    more: dict[str, Any] = {
        "data_collator": noisy_collate if cell["random"] == "collator" else plain_collate
    }
    if cell["feature"] == "ema":
        more["optimizer_cls_and_kwargs"] = (AdamWithAverage, {"lr": 0.05})
    return make_trainer(
        folder,
        scored("dropout", seed=seed),
        train=data,
        callbacks=[SaveAtEpochEnd()],
        more=more,
        train_sampling_strategy="group_by_length" if grouped else "random",
        per_device_train_batch_size=SIZE,
        dataloader_num_workers=cell["workers"],
        gradient_accumulation_steps=cell["accumulation"],
        max_steps=LAST_STEP[cell["accumulation"]],
        save_strategy="steps",
        save_steps=1,
        async_save=cell["save"] == "async",
        lr_scheduler_type="cosine",
        **features[cell["feature"]],
    )
