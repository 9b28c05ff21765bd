"""Names and parameters of the classes are those of the Hugging Face Trainer."""

import inspect
from typing import Any

import pytest

import trainer

transformers = pytest.importorskip("transformers")

NOT_OFFERED = {"create_model_card", "hyperparameter_search", "init_hf_repo", "push_to_hub"}


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.row(1)
@pytest.mark.parametrize("name", ["Trainer", "Seq2SeqTrainer"])
def test_constructors_take_the_same(name: str) -> None:
    ours, theirs = (getattr(module, name).__init__ for module in (trainer, transformers))
    assert parameters(ours) == parameters(theirs)
    defaults = [p.default for p in inspect.signature(theirs).parameters.values()][1:]
    assert [p.default for p in inspect.signature(ours).parameters.values()][1:] == defaults


def methods(name: str) -> list[tuple[str, str]]:
    kind = getattr(transformers, name)
    found = [n for n in dir(kind) if not n.startswith("_") and n not in NOT_OFFERED]
    return [(name, n) for n in found if callable(getattr(kind, n))]


@pytest.mark.parametrize(
    ("name", "method"), [*methods("Trainer"), *methods("Seq2SeqTrainer")], ids=str
)
def test_methods_take_the_same(name: str, method: str) -> None:
    ours, theirs = (getattr(getattr(m, name), method) for m in (trainer, transformers))
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", ["TrainerCallback", "TrainerState", "TrainerControl"])
def test_the_parts_of_callbacks_have_the_same_names(name: str) -> None:
    ours, theirs = (getattr(module, name) for module in (trainer, transformers))
    names = [n for n in dir(theirs) if not n.startswith("_")]
    assert [n for n in names if not hasattr(ours, n)] == []


def test_the_results_have_the_same_fields() -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    for name in ("TrainOutput", "PredictionOutput"):
        assert getattr(trainer, name)._fields == getattr(utils, name)._fields


def test_the_attributes_that_scripts_use_are_there(tmp_path: Any) -> None:
    from support.shell import make_trainer

    made = make_trainer(tmp_path)
    names = ("model", "model_wrapped", "is_model_parallel", "place_model_on_device", "is_in_train")
    names += ("args", "optimizer", "lr_scheduler", "state", "control", "callback_handler")
    names += ("accelerator", "processing_class", "data_collator", "label_names", "can_return_loss")
    names += ("model_accepts_loss_kwargs", "compute_loss_func")
    assert [name for name in names if not hasattr(made, name)] == []
