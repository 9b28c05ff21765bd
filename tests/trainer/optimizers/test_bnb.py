"""bitsandbytes: embeddings keep moments of 32 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import libraries
from support.shell import Scored, make_trainer, scored


class Words(nn.Module):
    """An embedding and a linear layer, both large enough for moments of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        return self.head(self.table((x * 8).long().clamp(-31, 32) + 31).mean(1))[:, :2]


class Manager:
    """Notes what is registered."""

    def __init__(self) -> None:
        self.overrides: list[Any] = []

    def get_instance(self) -> "Manager":
        return self

    def register_module_override(self, *override: Any) -> None:
        self.overrides.append(override)


@pytest.mark.row(33)
@pytest.mark.parametrize(
    ("name", "bits"), [("adamw_8bit", 8), ("paged_lion_8bit", 8), ("lion_32bit", 32), ("sgd", None)]
)
def test_embeddings_are_registered_with_8_bit_optimizers(
    name: str, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch, "bitsandbytes")
    import bitsandbytes.optim as library

    manager = library.GlobalOptimManager = Manager()
    model = scored(Words)
    optimizer = make_trainer(tmp_path, model, optim=name).create_optimizer()

    expected = [(model.body.table, "weight", {"optim_bits": 32})] if bits == 8 else []
    assert manager.overrides == expected
    assert optimizer.param_groups[0].get("optim_bits") == bits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["adamw_bnb_8bit", "lion_8bit", "rmsprop_bnb_8bit", "ademamix_8bit"]
)
def test_moments_of_embeddings_are_wide(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model: Scored = scored(Words)
    trainer = make_trainer(tmp_path, model, optim=name, max_steps=1)
    trainer.train()
    state = trainer.optimizer.state
    assert state[model.body.table.weight]["state1"].dtype is torch.float32
    assert state[model.body.head.weight]["state1"].dtype is torch.uint8
