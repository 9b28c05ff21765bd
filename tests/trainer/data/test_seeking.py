"""Going on far into very many samples costs nothing, and reads none that was seen."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from support.shell import At, make_trainer, samples, scored
from trainer.data.order import Feistel

N, DONE, SIZE = 10**9, 10**6, 2


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Endless:
    """A thousand million samples; keeps which were read."""

    deterministic = True

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.rows = samples(7)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return self.rows[index % 7]


def test_a_run_goes_on_after_a_million_steps_of_a_thousand_million_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "train_sampling_strategy": "feistel",
        "seed": 3,
        "max_steps": DONE + 4,
        "save_strategy": "steps",
        "save_steps": DONE,
        "logging_strategy": "no",
    }
    first = make_trainer(tmp_path, train=Endless(), **settings)

    def far(control: Any) -> None:  # as if all the steps in between had been made
        run = first._run
        run.state, run.batch = run.state.evolve(step=DONE - 1), DONE - 1
        first.state.global_step = DONE - 1

    first.add_callback(At("step_begin", 0, far))
    first.add_callback(At("step_end", DONE, lambda c: setattr(c, "should_training_stop", True)))
    first.train()

    data = Endless()
    second = make_trainer(tmp_path, scored(seed=1), train=data, **settings)
    calls: list[int] = []
    take = Feistel._take
    monkeypatch.setattr(
        Feistel, "_take", lambda *given: calls.append(len(given[2])) or take(*given)
    )

    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{DONE}"))
    translated = list(calls)
    assert second.state.global_step == DONE + 4
    assert data.reads == Feistel(N, 3).indices(0, DONE * SIZE, (DONE + 4) * SIZE).tolist()
    assert translated == [4096]  # one block of positions
    assert not set(data.reads) & set(Feistel(N, 3).indices(0, 0, 2 * 10**5).tolist())


def test_seeking_holds_no_order_in_memory() -> None:
    order = Feistel(N, 3)
    assert order.take(5, torch.tensor([N - 1])).numel() == 1
    assert not any(isinstance(value, torch.Tensor) for value in (order.n, order.seed))
