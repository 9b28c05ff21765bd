"""Checkpoints whose state DeepSpeed's engine saved: nothing is said about weights that was not read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Write = Callable[..., Path]
FACTS = {"tag": "global_step3", "stage": 2, "half": None, "world_size": 2}


@pytest.fixture
def write_deepspeed(write_checkpoint: Write) -> Write:
    """Save what DeepSpeed's checkpoints have in the ordinary files, and the engine's beside them."""

    def write(root: Path, value: float = 1.0, gathered: bool = True) -> Path:
        def write_model(folder: Path) -> None:
            engine = folder / FACTS["tag"]
            engine.mkdir()
            (engine / "mp_rank_00_model_states.pt").write_bytes(b"%f" % value)
            (folder / "latest").write_text(FACTS["tag"])
            (folder / "config.json").write_text("{}")
            if gathered:
                save_file({"w": torch.full((2,), value)}, folder / "model.safetensors")

        position = {"epoch": 0, "batch": 3, "deepspeed": FACTS}
        return write_checkpoint(root, {}, write_model=write_model, position=position)

    return write


def test_inspect_knows_no_digest(
    tmp_path: Path, write_deepspeed: Write, trainstep: Callable[..., Any]
) -> None:
    path = write_deepspeed(tmp_path)
    data = trainstep("inspect", path, "--json").data
    assert (data["format"], data["digest"], data["leaves"]) == ("deepspeed", None, [])
    text = trainstep("inspect", path).out
    assert "format     deepspeed" in text
    assert "digest     none: the state is in DeepSpeed's own files\n" in text
    report = trainstep("report", tmp_path, "--json").data
    assert report["checkpoints"][0]["digest"] is None
    assert trainstep("verify", path).status == 0


def test_other_weights_are_not_called_the_same(
    tmp_path: Path, write_deepspeed: Write, write_checkpoint: Write, refused: Callable[..., str]
) -> None:
    a, b = write_deepspeed(tmp_path / "a"), write_deepspeed(tmp_path / "b", 2.0)
    plain = write_checkpoint(tmp_path / "c", {"w": torch.ones(2)})
    for pair in ((a, b), (a, plain), (plain, a)):
        message = refused("diff", *pair)
        assert f"{a}: its state is in DeepSpeed's own files" in message
    message = refused("bisect", tmp_path / "a", tmp_path / "b")
    assert f"nothing to compare with: {a}: it has no digest: the state is in" in message
    message = refused("replay", a, "--script", "train.py")
    assert f"{a}: it cannot be replayed, as it has no digest: the state is in" in message


def test_bisect_says_what_it_passed_over(
    tmp_path: Path, write_checkpoint: Write, write_deepspeed: Write, trainstep: Callable[..., Any]
) -> None:
    for run in "ab":
        write_checkpoint(tmp_path / run, {"w": torch.ones(2)}, step=2)
    last = write_deepspeed(tmp_path / "b")
    outcome = trainstep("bisect", tmp_path / "a", tmp_path / "b")
    assert outcome.status == 0
    assert "compared 1 step" in outcome.out
    assert f"passed over: {last}: it has no digest: the state is in DeepSpeed's own" in outcome.out


def test_consolidate_leaves_it_to_deepspeeds_script(
    tmp_path: Path, write_deepspeed: Write, trainstep: Callable[..., Any], refused: Any
) -> None:
    parts, out = write_deepspeed(tmp_path / "parts", gathered=False), tmp_path / "out"
    assert "Run the zero_to_fp32.py in it" in refused("consolidate", parts, "--out", out)
    assert not out.exists()
    gathered = write_deepspeed(tmp_path / "gathered")
    assert trainstep("consolidate", gathered, "--out", out).status == 0
    assert sorted(one.name for one in out.iterdir()) == ["config.json", "model.safetensors"]
