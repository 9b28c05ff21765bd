"""``trainstep verify``: damage of every kind is found and named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.manifest import parse_manifest

FILES = (
    "host_rng-0.json",
    "model.safetensors",
    "optimizer.safetensors",
    "train_state.json",
    "trainer_state.json",
    "training_args.json",
)


def test_undamaged_checkpoints(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("verify", "a")
    assert outcome.status == 0
    assert "a/checkpoint-4: ok (16 tensors)" in outcome.out
    assert outcome.out.endswith("2 checkpoints, 0 damaged\n")
    for name in FILES:
        assert outcome.out.count(f"  ok  {name} ") == 2
    assert "params/" not in outcome.out
    listed = trainstep("verify", "a/checkpoint-8", "--leaves").out
    assert "  ok  params/body.0.weight" in listed
    assert listed.count(" in optimizer.safetensors\n") == 12


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damage_to_every_file_is_named(
    name: str,
    damage: str,
    runs: Path,
    trainstep: Callable[..., Any],
    flip_bit: Callable[..., None],
) -> None:
    file = Path("a/checkpoint-4", name)
    if damage == "flip":
        flip_bit(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    outcome = trainstep("verify", "a")
    assert outcome.status == 1
    assert "a/checkpoint-4: DAMAGED" in outcome.out
    assert "a/checkpoint-8: ok" in outcome.out
    assert outcome.out.endswith("2 checkpoints, 1 damaged\n")
    line = next(line for line in outcome.out.splitlines() if line.startswith("  damaged"))
    assert name in line
    if name != "manifest.json":
        reason = {"flip": "its SHA-256 is", "cut": "bytes, expected", "remove": "missing"}[damage]
        assert reason in line


def test_the_damaged_tensor_is_named_and_the_others_in_its_file_are_not(
    runs: Path, trainstep: Callable[..., Any], flip_bit: Callable[..., None]
) -> None:
    flip_bit(Path("a/checkpoint-4/model.safetensors"))
    data = trainstep("verify", "a/checkpoint-4", "--json").data
    assert not data["ok"]
    (one,) = data["checkpoints"]
    assert [file["name"] for file in one["files"] if not file["ok"]] == ["model.safetensors"]
    damaged = [leaf for leaf in one["leaves"] if leaf["ok"] is not True]
    assert len(damaged) == 1
    assert damaged[0]["file"] == "model.safetensors"
    assert damaged[0]["path"].startswith("params/")

    text = trainstep("verify", "a/checkpoint-4").out
    assert "(16 tensors, 1 damaged)" in text
    assert f"  damaged  {damaged[0]['path']} " in text


def test_tensors_that_could_not_be_read_are_neither_good_nor_bad(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    Path("a/checkpoint-4/optimizer.safetensors").unlink()
    outcome = trainstep("verify", "a/checkpoint-4")
    assert outcome.status == 1
    assert "(16 tensors, 12 not read)" in outcome.out
    Path("a/checkpoint-4/train_state.json").unlink()
    (one,) = trainstep("verify", "a/checkpoint-4", "--json").data["checkpoints"]
    assert all(leaf["ok"] is None for leaf in one["leaves"])


def test_a_tensor_that_was_written_wrong_in_an_undamaged_file(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    file = Path("a/checkpoint-4/manifest.json")
    manifest = parse_manifest(file.read_bytes())
    leaf = "opt_state/group0/exp_avg/body.0.weight"
    manifest.leaves[leaf] = manifest.leaves["params/body.0.weight"]
    file.write_bytes(manifest.render())
    outcome = trainstep("verify", "a/checkpoint-4")
    assert outcome.status == 1
    assert f"  damaged  {leaf} " in outcome.out
    assert f"the values of {leaf} are not those saved" in outcome.out


def test_a_checkpoint_under_the_name_of_another_step(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    shutil.move("a/checkpoint-4", "a/checkpoint-5")
    outcome = trainstep("verify", "a/checkpoint-5")
    assert outcome.status == 1
    assert "it holds step 4; the folder was renamed" in outcome.out


def test_a_save_that_was_cut_off_is_damage(runs: Path, trainstep: Callable[..., Any]) -> None:
    Path("a/checkpoint-12").mkdir()
    outcome = trainstep("verify", "a")
    assert outcome.status == 1
    assert "manifest.json: missing; the save was cut off" in outcome.out
    assert trainstep("verify", "a/checkpoint-12").status == 1


def test_nothing_to_verify(runs: Path, refused: Callable[..., str]) -> None:
    Path("empty").mkdir()
    assert "none named checkpoint-<step> is in it" in refused("verify", "empty")
    assert "train.py: no such folder" in refused("verify", "train.py")
