"""What optimizers keep, as trees that a checkpoint can hold."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support import libraries
from trainer.optimizers.packing import pack, place, unpack


def through_a_file(packed: Any) -> Any:
    """Take a tree where a checkpoint would."""
    state = ts.TrainState(0, {}, {}, {"it": packed}, ts.rng.key(0))
    return ts.serialize.from_flat(*ts.serialize.to_flat(state)).opt_state["it"]


def test_objects_of_known_classes_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.pretend(monkeypatch, "galore_torch")
    projector = libraries.GaLoreProjector(2, 5)
    projector.ortho_matrix = torch.ones(3, 2)
    again = unpack(through_a_file(pack({"projector": projector}, {})), {})["projector"]

    assert type(again) is libraries.GaLoreProjector
    assert vars(again).keys() == vars(projector).keys()
    assert (again.rank, again.gap) == (2, 5)
    assert again.ortho_matrix.data_ptr() == projector.ortho_matrix.data_ptr()


def test_no_other_class_is_looked_up() -> None:
    with pytest.raises(
        ValueError, match=r"an object of class 'os\.system'; known are galore_torch\.gal"
    ):
        unpack({"@object": "os.system", "fields": {}}, {})
    with pytest.raises(ValueError, match=r"known are torchao\.optim"):
        unpack({"@tensor": "builtins.eval", "parts": {}, "context": []}, {})


def test_dicts_by_parameter_are_kept_by_name() -> None:
    weight, stranger = torch.ones(2), torch.zeros(2)
    packed = through_a_file(pack({weight: {"step": 3}, stranger: {}}, {weight: "body.weight"}))
    assert packed == {"@by_parameter": {"body.weight": {"step": 3}}}
    (key, value), *rest = unpack(packed, {"body.weight": weight}).items()
    assert key is weight
    assert value == {"step": 3}
    assert rest == []


def test_plain_values_stay_as_they_are() -> None:
    value = {"a": [1, (2.5, "x", None)], "shape": torch.Size([2, 3]), "dtype": torch.bfloat16}
    again = unpack(through_a_file(pack(value, {})), {})
    assert again == value
    assert type(again["shape"]) is tuple


def test_the_order_in_memory_is_kept() -> None:
    columns = torch.arange(6.0).reshape(2, 3).T
    packed = pack([columns], {})
    assert unpack(packed, {})[0] is columns
    packed[0]["@strided"] = columns.contiguous()  # as a file gives it
    (again,) = unpack(through_a_file(packed), {})
    assert again.stride() == columns.stride() == (1, 3)
    assert torch.equal(again, columns)


def test_tensors_are_moved_wherever_they_are() -> None:
    tree = {"@object": "x", "fields": {"matrix": torch.ones(2), "parts": [torch.ones(1), 3]}}
    moved = place(tree, torch.device("meta"))
    assert moved["fields"]["matrix"].is_meta
    assert moved["fields"]["parts"][0].is_meta
    assert moved["fields"]["parts"][1] == 3


@pytest.mark.parametrize("kind", ["subclass_4bit.OptimState4bit", "subclass_8bit.OptimState8bit"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_come_back(kind: str) -> None:
    module, cls = kind.split(".")
    library = pytest.importorskip(f"torchao.optim.{module}")
    moment = getattr(library, cls).zeros((16, 32), block_size=128)
    moment.copy_(torch.linspace(-1, 1, 512).view(16, 32))
    again = unpack(through_a_file(pack(moment, {})), {})

    assert type(again) is type(moment)
    assert torch.equal(again.dequantize(), moment.dequantize())
    assert again.codes.data_ptr() == moment.codes.data_ptr()
