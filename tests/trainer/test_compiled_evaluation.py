"""With ``torch_compile`` evaluation and prediction run the compiled model, too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainstep as ts
from support.shell import logged, make_trainer, samples, scored, weights
from trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Compilations:
    """A backend that runs what was traced as it is, and counts how often that is."""

    def __init__(self) -> None:
        self.made = self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.made += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


class Noting(Trainer):
    """Notes the models that it is given to predict with."""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("models", []).append(model)
        return super().prediction_step(model, *args, **kwargs)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    """Counts what ``torch_compile_backend="eager"`` runs."""
    counting, compile = Compilations(), torch.compile

    def patched(model: Any, *, backend: str, mode: Any) -> Any:
        assert backend == "eager"
        return compile(model, backend=counting, mode=mode)

    monkeypatch.setattr(torch, "compile", patched)
    return counting


def make(folder: Path, *, compiled: bool = True, **changes: Any) -> Any:
    options: dict[str, Any] = {"torch_compile_backend": "eager"} if compiled else {}
    return make_trainer(folder, make=Noting, evaluation=samples(8, seed=1), **options, **changes)


def test_evaluate_and_predict_run_the_compiled_model(backend: Compilations, tmp_path: Path) -> None:
    plain, trainer = make(tmp_path, compiled=False), make(tmp_path)
    metrics = trainer.evaluate()
    assert backend.runs == 2  # batches of 4
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    mine, theirs = (t.predict(samples(8, seed=2)) for t in (trainer, plain))
    assert backend.runs == 4
    assert np.array_equal(mine.predictions, theirs.predictions)
    assert mine.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert len({id(model) for model in trainer.models}) == 1  # compiled once
    assert trainer.models[0]._orig_mod is trainer.model
    assert plain.models[0] is plain.model


def test_in_training_it_is_the_model_that_trains(backend: Compilations, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}
    plain, trainer = make(tmp_path, compiled=False, **options), make(tmp_path, **options)
    for each in (plain, trainer):
        each.evaluate()
        each.train()
    assert ts.digest(trainer.train_state) == ts.digest(plain.train_state)
    assert logged(trainer, "eval_loss") == logged(plain, "eval_loss")
    assert {id(model) for model in trainer.models} == {id(trainer.model_wrapped)}
    assert backend.runs == 10 + 6 * 2
    made = backend.made
    trainer.train()
    trainer.evaluate()
    assert backend.made == made  # nothing is compiled again
    assert all(module.training for module in trainer.model.modules())


def test_a_new_model_is_compiled_anew(backend: Compilations, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.evaluate()
    trainer.model = scored(seed=1)
    trainer.evaluate()
    first, last = trainer.models[0], trainer.models[-1]
    assert first is not last
    assert last._orig_mod is trainer.model


def test_in_half_precision(backend: Compilations, tmp_path: Path) -> None:
    plain = make(tmp_path, compiled=False, bf16_full_eval=True)
    trainer = make(tmp_path, bf16_full_eval=True)
    before = weights(trainer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert backend.runs == 2
    trainer.args.bf16_full_eval = plain.args.bf16_full_eval = False
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert ts.equal(weights(trainer), before)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_graphs_of_their_own_leave_evaluation_alone(mode: str, tmp_path: Path) -> None:
    # Their outputs lie in memory that the next batch overwrites, and evaluations keep outputs.
    trainer = make(tmp_path, compiled=False, torch_compile_mode=mode)
    assert trainer.args.torch_compile
    trainer.evaluate()
    assert trainer.models[0] is trainer.model
