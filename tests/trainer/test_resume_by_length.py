"""Batches grouped by length come in the same order after resuming, also beyond the first epoch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.shell import make_trainer, outcome


class Summing(nn.Module):
    """Notes how long the rows are that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 3)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((input_ids > 0).sum(1).tolist())
        return {"loss": (self.table(input_ids).mean((1, 2)) - labels).square().mean()}


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": torch.stack([row["labels"] for row in rows])}


def rows() -> list[dict[str, Tensor]]:
    lengths = [(7 * i * i + 3 * i) % 23 + 1 for i in range(18)]
    return [
        {"input_ids": torch.full((n,), 1 + i), "labels": torch.tensor(i / 9)}
        for i, n in enumerate(lengths)
    ]


@pytest.mark.row(193)
@pytest.mark.parametrize("step", [3, 6, 9])
def test_the_end_is_the_same_from_any_epoch(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    settings: dict[str, Any] = {
        "train": rows(),
        "evaluation": [],
        "more": {"data_collator": padded},
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": step,
    }
    whole = make_trainer(tmp_path / "whole", Summing(), **settings)
    expected = outcome(whole, whole.train())
    trainer = make_trainer(tmp_path / "again", Summing(), **settings)
    torch.rand(step)  # the order does not depend on what the process has drawn
    result = trainer.train(str(tmp_path / "whole" / f"checkpoint-{step}"))

    assert outcome(trainer, result) == expected
    assert trainer.model.seen == whole.model.seen[-len(trainer.model.seen) :]
    epochs = [whole.model.seen[i : i + 9] for i in (0, 9, 18)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(epoch[0][0] == max(n for batch in epoch for n in batch) for epoch in epochs)
