"""What is found out about models, and their weights on disk."""

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support import models
from support.peer import texts, tiny
from support.shell import Scored, make_trainer, scored, weights
from trainer import modeling


class Answering(nn.Module):
    """A module whose ``forward`` has what introspection looks for."""

    def forward(
        self, x: Tensor, my_labels: Tensor, start_positions: Any = None, return_loss: bool = True
    ) -> None: ...


class MyQuestionAnswering(Answering):
    """The class's name makes the positions labels."""


class Open(nn.Module):
    """Takes anything."""

    def forward(self, x: Tensor, **kwargs: Any) -> None: ...


class Closed(Open):
    """Takes anything, but does not divide its loss by a number of items."""

    accepts_loss_kwargs = False


def test_signatures() -> None:
    names = ["x", "my_labels", "start_positions", "return_loss"]
    assert modeling.forward_names(Answering()) == names
    assert modeling.label_names(Answering()) == ["my_labels"]
    assert modeling.label_names(MyQuestionAnswering()) == ["my_labels", "start_positions"]
    assert modeling.can_return_loss(Answering())
    assert not modeling.can_return_loss(Open())
    accepts = modeling.accepts_loss_kwargs
    assert [accepts(model) for model in (Open(), Closed(), Answering())] == [True, False, False]


def test_wrappers_are_looked_through() -> None:
    model = Open()
    compiled = nn.Module()
    compiled._orig_mod = nn.DataParallel(model)

    assert modeling.unwrap(compiled) is model
    assert modeling.forward_names(compiled) == ["x", "kwargs"]
    assert modeling.accepts_loss_kwargs(nn.DataParallel(model))


def tied_trainer(folder: Path, seed: int) -> Any:
    return make_trainer(folder, scored("tied", seed=seed))


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path: Path) -> None:
    trained, other = tied_trainer(tmp_path / "a", 0), tied_trainer(tmp_path / "b", 1)
    trained.train()
    trained.save_model()

    stored = load_file(tmp_path / "a" / "model.safetensors")
    tied = {"body.embedding.weight", "body.head.weight"}
    assert len(tied & stored.keys()) == 1
    tensor = other.model.body.embedding.weight
    modeling.load_weights(other.model, tmp_path / "a")
    assert other.model.body.embedding.weight is tensor is other.model.body.head.weight
    for name, weight in weights(trained).items():
        assert torch.equal(weights(other)[name], weight), name


def test_saving_goes_where_it_is_told_and_says_with_which_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", scored("batch_norm"), learning_rate=0.125)
    trainer.save_model(str(tmp_path / "new" / "place"))

    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} == {
        "model.safetensors",
        "training_args.json",
    }
    assert "0.125" in (tmp_path / "new" / "place" / "training_args.json").read_text()
    stored = load_file(tmp_path / "new" / "place" / "model.safetensors")
    assert stored.keys() == trainer.model.state_dict().keys()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    modeling.save_weights(scored("mlp"), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit Scored.*(?s:.)*body\.embedding\.weight"):
        modeling.load_weights(scored("tied"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in .*nowhere"):
        modeling.load_weights(scored("mlp"), tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_of_transformers_goes_through_from_pretrained(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    trainer = make_trainer(
        tmp_path, model, train=texts(6), evaluation=texts(3), save_strategy="epoch"
    )
    trainer.train()
    trainer.save_model()

    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        for key, tensor in weights(trainer).items():
            assert torch.equal(again.state_dict()[key], tensor), key
    fresh = tiny(name)
    modeling.load_weights(fresh, tmp_path / "checkpoint-3")
    for key, tensor in weights(trainer).items():
        assert torch.equal(fresh.state_dict()[key], tensor), key


class Processor:
    """Saves itself."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "processor.txt").write_text("here")


def test_the_processor_is_saved_along(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, more={"processing_class": Processor()})
    trainer.save_model()
    assert (tmp_path / "processor.txt").exists()

    class Collator:
        tokenizer = Processor()

        def __call__(self, samples: list[Any]) -> Any: ...

    trainer = make_trainer(tmp_path / "other", more={"data_collator": Collator()})
    trainer.save_model()
    assert (tmp_path / "other" / "processor.txt").exists()


Pair = namedtuple("Pair", "a b")


def test_nested_values_are_moved_and_keep_their_types() -> None:
    there = torch.device("meta")
    value = OrderedDict(a=torch.zeros(2), b=[Pair(torch.zeros(1), "text")], c={"d": (1, None)})
    moved = modeling.move(value, there)

    assert type(moved) is OrderedDict
    assert moved["a"].device == moved["b"][0].a.device == there
    assert type(moved["b"][0]) is Pair
    assert moved["b"][0].b == "text"
    assert moved["c"] == {"d": (1, None)}
    here = torch.zeros(2)
    assert modeling.move([here], here.device)[0] is here


def test_buffers_that_a_module_replaces_reach_state_and_disk(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Scored(models.build("counting")))
    trainer.train()
    trainer.save_model()

    calls, average = trainer.model.body.calls, trainer.model.body.average
    assert int(calls) == 5
    assert bool(average.any())
    state = trainer.train_state
    assert torch.equal(state.buffers["body.average"], average)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["body.average"], average)
