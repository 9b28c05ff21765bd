"""What does not fit together is said with what was expected, what there is, and what to do."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.shell import make_trainer, samples, scored
from trainer import TrainingArguments


class Bare(nn.Module):
    """Returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


class Several(nn.Module):
    """Several labels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.config = SimpleNamespace(problem_type="multi_label_classification")

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def test_neither_loss_nor_labels(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Bare(), train=[{"x": row["x"]} for row in samples()])
    with pytest.raises(ValueError, match=r"did not return a loss.* keys logits; its inputs had x"):
        trainer.train()
    assert not trainer.is_in_train


def test_no_column_has_a_name_that_the_model_takes(tmp_path: Path) -> None:
    rows = [{"pixels": row["x"], "target": row["labels"]} for row in samples()]
    with pytest.raises(
        ValueError,
        match=r"keys \(pixels, target\) reaches the model, whose forward takes x, labels\.",
    ):
        make_trainer(tmp_path, train=rows).train()


def test_one_column_has_another_name(tmp_path: Path) -> None:
    rows = [{"pixels": row["x"], "labels": row["labels"]} for row in samples()]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'") as raised:
        make_trainer(tmp_path, train=rows).train()
    assert raised.value.__notes__ == [
        "while training on the batch {labels: (2, 2) float32} at step 0; the model's forward takes x, "
        "labels, the training data have pixels, labels"
    ]


def test_accumulation_is_given_once(tmp_path: Path) -> None:
    config = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    args = TrainingArguments(str(tmp_path), accelerator_config=config)
    assert args.gradient_accumulation_steps == 4
    assert TrainingArguments(**args.to_dict()).gradient_accumulation_steps == 4
    with pytest.raises(
        ValueError, match=r"accumulation_steps=2 contradicts num_steps=4.*one of them"
    ):
        TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, accelerator_config=config)
    trainer = make_trainer(tmp_path, accelerator_config=config)
    assert trainer.train().global_step == 2  # 5 batches
    assert trainer.accelerator.gradient_accumulation_steps == 1


def test_labels_that_do_not_exclude_each_other_are_not_smoothed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"label_smoothing_factor=0.1 has no effect"):
        trainer = make_trainer(tmp_path, Several(), label_smoothing_factor=0.1)
    assert trainer.label_smoother is None
    assert trainer.train().global_step == 5


def test_metrics_that_are_no_dict(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, more={"compute_metrics": lambda prediction: 3})
    with pytest.raises(TypeError, match=r"must return a dict of names and values.*type int"):
        trainer.evaluate()


class Adapter(nn.Module):
    """What peft's models look like from outside: a wrapper whose forward takes anything."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.peft_config: dict[str, Any] = {"default": None}

    def get_base_model(self) -> nn.Module:
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_what_a_model_with_adapters_takes_is_told_by_the_model_inside(tmp_path: Path) -> None:
    rows = [row | {"id": torch.tensor(i)} for i, row in enumerate(samples())]
    trainer = make_trainer(tmp_path, Adapter(scored("mlp")), train=rows)
    assert trainer.label_names == ["labels"]
    assert not trainer.model_accepts_loss_kwargs
    assert trainer.train().global_step == 5  # "id" did not reach the model, which would refuse it
    assert "kwargs" in inspect.signature(trainer.model.forward).parameters
