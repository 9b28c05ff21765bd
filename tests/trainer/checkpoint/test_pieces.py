"""Tensors in pieces: names, joining, reading piece by piece from any checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support import models
from trainer.checkpoint import CheckpointError, Contents, consolidate, load, open_lazily, save
from trainer.checkpoint.pieces import (
    is_in_pieces,
    is_state_file,
    join,
    part,
    piece_name,
    specs,
    state_file,
)
from trainer.checkpoint.tensors import write_stream
from trainstep.serialize import to_flat


def write_model(folder: Path) -> None:
    """Write a model without weights."""
    (folder / "config.json").write_text("{}")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ts.TrainState]:
    """A checkpoint of one process, and the state in it."""
    model = models.build("mlp")
    state = ts.init(model, ts.optim.adamw(), seed=0)
    contents = Contents(write_model, state, {"epoch": 0}, "{}", {})
    return save(tmp_path, 3, contents), state


def test_names() -> None:
    assert piece_name("params/a", (4, 2), (0, 0), (4, 2)) == "params/a"
    assert piece_name("params/a", (4, 2), (2, 0), (2, 2)) == "params/a@2,0"
    assert piece_name("step", (), (), ()) == "step"
    assert is_state_file(state_file(12))
    assert not is_state_file("model.safetensors")


def test_pieces_join_to_the_whole_and_are_given_up() -> None:
    a, b = torch.arange(12.0).reshape(4, 3), torch.tensor(7)
    pieces: dict[str, Any] = {"a@0,0": a[:1].clone(), "a@1,0": a[1:].clone(), "b": b}
    index = {"a": {"a@0,0": [[0, 0], [1, 3]], "a@1,0": [[1, 0], [3, 3]]}}
    whole = {"a": (torch.float32, (4, 3)), "b": (torch.int64, ())}
    joined = join(pieces, index, whole)
    assert torch.equal(joined["a"], a)
    assert joined["b"] is b
    assert pieces == {}
    assert torch.equal(part(a, (1, 1), (2, 2)), a[1:3, 1:3])


def test_specs_are_those_of_the_leaves() -> None:
    state = ts.init(models.build("mlp"), ts.optim.adamw(), seed=0)
    leaves, metadata = to_flat(state)
    expected = {path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in leaves.items()}
    assert specs(metadata["structure"]) == expected


def test_a_checkpoint_of_one_process_is_read_leaf_by_leaf(saved: Any) -> None:
    path, state = saved
    found = open_lazily(path)
    assert found.state is None
    assert found.position == {"epoch": 0}
    assert found.source is not None
    leaves, _ = to_flat(state)
    assert found.source.whole.keys() == leaves.keys()
    for leaf, tensor in leaves.items():
        assert torch.equal(found.source.assemble(leaf), tensor)
    assert not is_in_pieces(path)
    assert load(path).source is None


def test_damage_is_found_when_it_is_read(saved: Any) -> None:
    path, _ = saved
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    source = open_lazily(path).source  # reads no tensors
    assert source is not None
    told = []
    for leaf in source.whole:
        try:
            source.assemble(leaf)
        except CheckpointError as error:
            told.append(str(error))
    assert len(told) == 1
    assert "are not those saved" in told[0]
    file.unlink()
    source = open_lazily(path).source
    assert source is not None
    with pytest.raises(CheckpointError, match=r"cannot be read.*trainstep verify"):
        source.assemble("opt_state/step/0.weight")


def test_damaged_texts_are_refused_at_once(saved: Any) -> None:
    path, _ = saved
    text = json.loads((path / "train_state.json").read_text())
    (path / "train_state.json").write_text(json.dumps({**text, "position": {}}))
    with pytest.raises(CheckpointError, match=r"train_state\.json"):
        open_lazily(path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_lazily(path / "nowhere")


def test_there_is_nothing_to_put_together(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing to put together"):
        consolidate(saved[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streams_ask_for_one_tensor_after_the_other(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a": torch.ones(3).half(), "b": torch.arange(4.0), "c": torch.zeros(0)}
    asked: list[str] = []

    def value(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    form = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_stream(tmp_path / "x.safetensors", form, value)
    assert asked == ["b", "c", "a"]  # wide types first
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
