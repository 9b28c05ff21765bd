"""What ``Trainer`` refuses, and in which words; seeds and defaults."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.shell import (
    Scored,
    Stream,
    make_args,
    make_trainer,
    samples,
    scored,
    timeless,
)
from trainer import Trainer, set_seed


class Cut(Scored):
    """Its loss does not depend on its parameters."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return {"loss": super().forward(x, labels)["loss"].detach()}


def test_a_loss_without_gradient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not depend on any trainable parameter.*requires_grad=True"
    ) as raised:
        make_trainer(tmp_path, scored("mlp", Cut)).train()
    assert "at step 0" in raised.value.__notes__[0]


def test_a_model_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    model = scored("mlp")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        make_trainer(tmp_path, model).train()


def test_a_missing_loss_is_explained(tmp_path: Path) -> None:
    data = [{"x": row["x"]} for row in samples()]
    with pytest.raises(
        ValueError,
        match=r"did not return a loss. Its outputs have the keys logits; its inputs had x",
    ):
        make_trainer(tmp_path, train=data).train()


def test_a_batch_of_which_nothing_is_left_is_explained(tmp_path: Path) -> None:
    data = [{"pixels": row["x"]} for row in samples()]
    with pytest.raises(ValueError, match=r"the batch is empty.*forward takes x, labels.*Rename"):
        make_trainer(tmp_path, train=data).train()


def test_empty_training_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no batch: the dataset has 0 samples"):
        make_trainer(tmp_path, train=[]).train()
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer.train()


def test_a_wrong_batch_shape_is_shown_with_its_step(tmp_path: Path) -> None:
    data = [{"x": torch.zeros(3), "labels": torch.zeros(2)}] * 4
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as raised:
        make_trainer(tmp_path, train=data).train()
    assert raised.value.__notes__ == [
        "while training on the batch {x: (2, 3) float32, labels: (2, 2) float32} at step 0"
    ]


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .*file/out cannot be written.*Choose another"):
        make_trainer(tmp_path / "file" / "out")


@pytest.mark.row(1, 5, 80)
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RuntimeError, {"model": None}, "requires a model, or a model_init"),
        (TypeError, {"model": Scored}, r"must be an instance, got the class Scored.*model_init="),
        (ValueError, {"model_init": scored}, "a model or a model_init, not both"),
        (
            ValueError,
            {"args": {"eval_strategy": "steps"}},
            "eval_strategy='steps' needs an eval_data",
        ),
        (TypeError, {"data_collator": 3}, "data_collator must be callable, got int"),
        (ValueError, {"train_dataset": Stream([])}, "no length.*set max_steps to the number"),
        (
            ValueError,
            {"args": {"save_strategy": "best", "eval_strategy": "no"}},
            'save_strategy="best" needs metric_for_best_model',
        ),
    ],
)
def test_contradictions_are_refused_at_construction(
    kind: type[Exception], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = make_args(tmp_path, **settings.pop("args", {}))
    with pytest.raises(kind, match=message):
        Trainer(**{"model": scored(), "args": args, **settings})


def test_a_model_init_that_returns_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="model_init returned None"):
        Trainer(args=make_args(tmp_path), model_init=lambda: None)  # type: ignore[arg-type,return-value]


def test_a_search_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="hyperparameter search"):
        make_trainer(tmp_path).train(trial={"learning_rate": 1.0})


@pytest.mark.row(93)
def test_seeding_covers_all_generators() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    set_seed(2**33 + 1)
    first = draw()
    set_seed(2**33 + 1)
    assert draw() == first
    set_seed(3)
    assert not set(draw()) & set(first)


@pytest.mark.row(1)
def test_a_trainer_needs_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(scored())

    assert trainer.args.output_dir == "tmp_trainer"
    assert (tmp_path / "tmp_trainer").is_dir()
    assert timeless(trainer.state.log_history) == []
