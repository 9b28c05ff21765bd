"""``trainstep inspect``: our checkpoints, and folders of the Hugging Face Trainer."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trainstep as ts
from support.peer import theirs, tiny
from support.shell import samples, scored
from trainer import checkpoint


def test_what_it_says_is_what_the_checkpoint_holds(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    data = trainstep("inspect", "a/checkpoint-4", "--json").data
    found = checkpoint.load("a/checkpoint-4")
    assert found.state is not None

    assert data["digest"] == ts.digest(found.state)
    assert (data["format"], data["step"], data["max_steps"]) == ("safe", 4, 8)
    assert (data["epoch"], data["world_size"]) == (1.0, 1)
    assert data["arguments"] == found.arguments
    assert data["versions"] == found.manifest.versions
    assert data["parameters"] == sum(p.numel() for p in found.state.params.values())
    tensors = ts.serialize.to_flat(found.state)[0]
    assert {leaf["path"]: (leaf["dtype"], leaf["shape"]) for leaf in data["leaves"]} == {
        path: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for path, tensor in tensors.items()
    }
    for file in data["files"]:
        assert file["size"] == Path("a/checkpoint-4", file["name"]).stat().st_size


def test_every_kind_of_leaf_enters_the_digest(
    tmp_path: Path, write_checkpoint: Callable[..., Path], trainstep: Callable[..., Any]
) -> None:
    params = {
        "complex": torch.ones(2, dtype=torch.complex128),
        "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "a/b": torch.ones(1, dtype=torch.int64),
    }
    path = write_checkpoint(tmp_path, params)
    data = trainstep("inspect", path, "--json").data
    assert data["digest"] == ts.digest(checkpoint.load(path).state)
    assert {leaf["path"]: leaf["nbytes"] for leaf in data["leaves"]} == {
        "params/complex": 32,
        "params/scalar": 2,
        "params/empty": 0,
        "params/a/b": 8,
    }


def test_the_text_sums_up_and_lists_on_demand(runs: Path, trainstep: Callable[..., Any]) -> None:
    text = trainstep("inspect", "a/checkpoint-4").out
    assert "step        4 of 8, epoch 1\n" in text
    assert "params     float32  4 tensors   49 numbers   196 B\n" in text
    assert "body.0.weight" not in text
    assert "learning_rate                0.1\n" in text
    assert "adam_beta1" not in text

    text = trainstep("inspect", "a/checkpoint-4", "--leaves", "--arguments").out
    assert "params/body.0.weight" in text
    assert "(8, 4)" in text
    assert "adam_beta1" in text


def test_of_an_output_folder_the_newest_is_described(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    assert trainstep("inspect", "a").out == trainstep("inspect", "a/checkpoint-8").out


def test_a_checkpoint_of_the_model_only(
    tmp_path: Path, write_checkpoint: Callable[..., Path], trainstep: Callable[..., Any]
) -> None:
    path = write_checkpoint(tmp_path, {}, state=None)
    assert trainstep("inspect", path, "--json").data["digest"] is None
    assert "digest     none: saved with save_only_model" in trainstep("inspect", path).out


def test_what_cannot_be_inspected(
    runs: Path, refused: Callable[..., str], flip_bit: Callable[..., None]
) -> None:
    flip_bit(Path("a/checkpoint-4/train_state.json"), 40)
    assert "train_state.json is damaged; `trainstep verify" in refused("inspect", "a/checkpoint-4")
    Path("a/checkpoint-8/manifest.json").unlink()
    assert "trainstep verify a/checkpoint-8` says so" in refused("inspect", "a/checkpoint-8")
    Path("empty").mkdir()
    assert "empty: no checkpoint: it has no manifest.json" in refused("inspect", "empty")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_pickles_are_named_and_not_opened(tmp_path: Path, trainstep: Callable[..., Any]) -> None:
    folder, trap = tmp_path / "checkpoint-5", tmp_path / "trap"
    folder.mkdir()
    save_file({"w": torch.ones(2, 3), "b": torch.ones(3)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5, "epoch": 0.5}))
    outcome = trainstep("inspect", folder, "--json")
    data = outcome.data

    assert not trap.exists()
    assert (data["format"], data["step"], data["epoch"]) == ("hf", 5, 0.5)
    assert (data["parameters"], data["world_size"]) == (9, 1)
    assert data["not_opened"] == [
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "training_args.bin",
    ]
    text = trainstep("inspect", folder).out
    assert "format      hf\n" in text
    assert "not opened  pickles: optimizer.pt, rng_state.pth" in text
    assert "model.safetensors  float32  2 tensors  9 numbers  36 B" in text


def test_a_damaged_foreign_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "trainer_state.json").write_text("[1]")
    assert "trainer_state.json: not a JSON object" in refused("inspect", tmp_path)
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert "model.safetensors: its header is longer" in refused("inspect", tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_what_the_trainer_of_transformers_wrote(
    tmp_path: Path, trainstep: Callable[..., Any], refused: Callable[..., str]
) -> None:
    model = scored()
    theirs(tmp_path, model, train=samples(), save_strategy="steps", save_steps=5).train()
    data = trainstep("inspect", tmp_path / "checkpoint-5", "--json").data
    assert (data["format"], data["step"], data["max_steps"]) == ("hf", 5, 5)
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"optimizer.pt", "training_args.bin"} <= set(data["not_opened"])

    folder = tmp_path / "checkpoint-5"
    assert "the Hugging Face Trainer wrote it" in refused("diff", folder, folder)
    outcome = trainstep("verify", folder)
    assert outcome.status == 0
    assert "checkpoint-5: ok (no manifest)" in outcome.out
    assert "  ok  optimizer.pt" in outcome.out
    weights = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(weights[: len(weights) // 2])
    outcome = trainstep("verify", folder)
    assert outcome.status == 1
    assert "checkpoint-5: DAMAGED (no manifest)" in outcome.out
    assert "  damaged  optimizer.pt" in outcome.out

    tiny("gpt2").save_pretrained(tmp_path / "model")
    text = trainstep("inspect", tmp_path / "model").out
    assert "model       gpt2 (GPT2LMHeadModel)" in text
    assert "format      hf (transformers " in text
