"""With ``torch_compile``, what the compiler could not put into one graph is said once."""

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.shell import Scored, make_trainer, samples, scored
from trainer import modeling

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Broken(Scored):
    """Goes back to Python in every call, and for another reason in evaluation."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        torch._dynamo.graph_break()
        if not self.training:
            torch._dynamo.graph_break("in evaluation")
        return super().forward(x, labels)


def make(folder: Path, model: Any, **changes: Any) -> Any:
    return make_trainer(
        folder, model, torch_compile_backend="eager", evaluation=samples(8, seed=1), **changes
    )


def told(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "in several parts" in r.getMessage()]


def test_breaks_are_said_once_for_each_place(tmp_path: Path, caplog: Any) -> None:
    trainer = make(tmp_path, scored(kind=Broken))
    trainer.train()
    line = Broken.forward.__code__.co_firstlineno + 1
    (message,) = told(caplog)
    assert f"{__file__}:{line} (torch._dynamo.graph_break()): " in message
    assert "fullgraph" not in message
    trainer.train()
    assert len(told(caplog)) == 1
    for _ in range(2):
        trainer.evaluate()
    (_, message) = told(caplog)
    assert f"{__file__}:{line + 2} (" in message
    assert f"{__file__}:{line} (" not in message
    (level,) = {r.levelno for r in caplog.records if r.getMessage() == message}
    assert level == logging.WARNING


def test_one_graph_says_nothing(tmp_path: Path, caplog: Any) -> None:
    trainer = make(tmp_path, scored())
    trainer.train()
    trainer.evaluate()
    assert told(caplog) == []


def test_other_processes_say_nothing(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    trainer = make(tmp_path, scored(kind=Broken))
    monkeypatch.setattr(type(trainer.args), "should_log", False)
    trainer.evaluate()
    assert told(caplog) == []


def test_the_wrapped_model_is_pytorchs_own(tmp_path: Path) -> None:
    trainer = make(tmp_path, scored(), save_strategy="steps", save_steps=2)
    trainer.train()
    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, torch._dynamo.OptimizedModule)
    assert modeling.unwrap(wrapped) is trainer.model
    assert trainer.accelerator.unwrap_model(wrapped, keep_torch_compile=False) is trainer.model
    assert "forward" not in vars(trainer.model)
    assert list(wrapped.state_dict()) == [f"_orig_mod.{n}" for n in trainer.model.state_dict()]
    wrapped.eval()
    again = pickle.loads(pickle.dumps(wrapped))
    batch = {name: torch.stack([s[name] for s in samples(4)]) for name in samples(1)[0]}
    assert torch.equal(again(**batch)["loss"], wrapped(**batch)["loss"])
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / modeling.WEIGHTS_NAME).exists()
