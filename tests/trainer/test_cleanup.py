"""A training that an exception ends leaves nothing behind: flags, hooks, handlers, threads, bars."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support.shell import At, Killed, kill, make_trainer
from trainer import Trainer


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# The step at which each event is waited for, in a run of 3.
AT = dict.fromkeys(("train_begin", "epoch_begin", "step_begin", "substep_end"), 0)
AT |= dict.fromkeys(("pre_optimizer_step", "optimizer_step"), 0)
AT |= dict.fromkeys(("step_end", "prediction_step", "evaluate", "log", "save"), 1)
AT |= dict.fromkeys(("epoch_end", "train_end"), 3)


class Words(nn.Module):
    """Has input embeddings, so that noise can be put on them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.table((x * 2).long().clamp(-3, 4) + 3).mean(1))
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "memory-sampler"}


def build(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "neftune_noise_alpha": 5.0,
        "debug": "underflow_overflow",
        "enable_jit_checkpoint": True,
        "skip_memory_metrics": False,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return make_trainer(folder, Words(), **(settings | changes))


@pytest.mark.row(213)
@pytest.mark.parametrize("event", AT)
def test_a_callback_that_raises_leaves_nothing_behind(event: str, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    trainer = build(tmp_path)
    inside: list[Any] = []

    def act(control: Any) -> None:
        inside.append((hooks(trainer.model), signal.getsignal(signal.SIGTERM), trainer.is_in_train))
        kill(control)

    trainer.add_callback(At(event, AT[event], act))
    with pytest.raises(Killed):
        trainer.train()

    ((count, handler, running),) = inside
    assert count > 1  # the noise and the frames were there
    assert running or event == "train_end"
    assert handler is not before[signal.SIGTERM] or event == "train_end"
    assert not trainer.is_in_train
    assert hooks(trainer.model) == 0
    assert {number: signal.getsignal(number) for number in before} == before
    assert threads() == set()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_an_evaluation_that_fails_leaves_no_thread(name: str, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    bad = [{"x": torch.zeros(1, 1, 1, 1), "labels": torch.zeros(3)}]
    with pytest.raises(RuntimeError):
        getattr(trainer, name)(bad)
    assert threads() == set()
    assert "eval_mem_cpu_alloc_delta" in trainer.evaluate()


class Failing(Trainer):
    """Fails in the third training step, or in the second evaluation."""

    where = "training_step"
    calls = 0

    def training_step(self, *given: Any) -> Tensor:
        self.fail("training_step", 3)
        return super().training_step(*given)

    def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
        self.fail("evaluate", 2)
        return super().evaluate(*given, **options)

    def fail(self, where: str, at: int) -> None:
        self.calls += where == self.where
        if where == self.where and self.calls == at:
            raise KeyError(where)


@pytest.mark.row(213)
@pytest.mark.parametrize("where", ["training_step", "evaluate"])
def test_an_error_in_a_step_or_an_evaluation_leaves_nothing_behind(
    where: str, tmp_path: Path
) -> None:
    trainer = build(tmp_path / "a", make=Failing)
    trainer.where = where
    with pytest.raises(KeyError):
        trainer.train()
    assert not trainer.is_in_train
    assert hooks(trainer.model) == 0
    assert threads() == set()

    # It resumes from what it saved, and ends as a run that nothing happened to.
    trainer.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "b")
    whole.train()
    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)
