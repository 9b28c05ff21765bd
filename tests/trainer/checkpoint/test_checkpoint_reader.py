"""Damage of every kind is noticed by ``verify``, ``load`` and ``newest``."""

import json
import os
import shutil

import pytest
import torch

import trainstep as ts
from trainer.checkpoint import CheckpointError, list_checkpoints, load, newest, save, verify
from trainer.checkpoint.manifest import parse_manifest

FILES = (
    *("model.safetensors", "config.json", "processor/vocab.txt"),
    *("optimizer.safetensors", "weights.safetensors"),
    *("train_state.json", "trainer_state.json", "training_args.json", "manifest.json"),
    *("host_rng-0.json", "host_rng-1.json"),
)


DESCRIPTION = "config.json"
"""The one among them that only describes the model; see ``layout.only_describes``."""


@pytest.fixture
def root(tmp_path, make):
    """Two checkpoints, of steps 5 and 10."""
    save(tmp_path, 5, make.contents(make.state(seed=5)))
    save(tmp_path, 10, make.contents(make.state(seed=10)))
    return tmp_path


def places(size: int, count: int) -> list[int]:
    """Return ``count`` offsets spread over a file, both ends among them."""
    return sorted({round(i * (size - 1) / (count - 1)) for i in range(count)})


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_noticed_anywhere(root, name):
    file = root / "checkpoint-10" / name
    good = file.read_bytes()
    for number, place in enumerate(places(len(good), 25)):
        bad = bytearray(good)
        bad[place] ^= 1 << number % 8
        file.write_bytes(bad)
        problems = verify(root / "checkpoint-10")
        assert any(problem.startswith(f"{name}:") for problem in problems), (place, problems)
    path, skipped = newest(root)
    if name == DESCRIPTION:
        assert (path, skipped) == (root / "checkpoint-10", [])
        assert verify(path, descriptions=False) == []
    else:
        with pytest.raises(CheckpointError, match=f"cannot be used:\n  {name}: "):
            load(root / "checkpoint-10")
        assert path == root / "checkpoint-5"
        assert [p for p, _ in skipped] == [root / "checkpoint-10"]
        assert skipped[0][1].startswith(f"{name}: ")
    file.write_bytes(good)
    assert verify(root / "checkpoint-10") == []


@pytest.mark.parametrize("name", FILES)
def test_truncation_and_growth_are_noticed(root, name):
    file = root / "checkpoint-10" / name
    good = file.read_bytes()
    for bad in [*(good[:place] for place in places(len(good), 6)), good + b"\n"]:
        file.write_bytes(bad)
        problems = verify(root / "checkpoint-10")
        if name == "manifest.json":
            assert problems[0].startswith("manifest.json: it is damaged")
        else:
            text = f"{name}: it has {len(bad)} bytes, expected {len(good)}"
            assert [problem.partition(";")[0] for problem in problems] == [text]
        if name != DESCRIPTION:
            with pytest.raises(CheckpointError):
                load(root / "checkpoint-10")
    assert newest(root)[0] == root / f"checkpoint-{10 if name == DESCRIPTION else 5}"


def test_a_description_that_was_edited_is_warned_of(root, caplog):
    file = root / "checkpoint-10" / DESCRIPTION
    file.write_text("{}")
    assert ts.equal(load(root / "checkpoint-10").state, load(root / "checkpoint-5").state) is False
    [record] = [r for r in caplog.records if DESCRIPTION in r.getMessage()]
    assert (
        "checkpoint-10 has changed since it was saved: config.json: it has 2" in record.getMessage()
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(root, name):
    (root / "checkpoint-10" / name).unlink()
    problems = verify(root / "checkpoint-10")
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: missing")
    assert newest(root)[0] == root / "checkpoint-5"


def test_the_damaged_leaf_is_named(root, make):
    file = root / "checkpoint-10" / "model.safetensors"
    data, weight = file.read_bytes(), make.state(seed=10).params["body.weight"]
    place = data.index(weight.numpy().tobytes())
    file.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    problems = verify(root / "checkpoint-10")
    assert "its SHA-256 is " in problems[0]
    assert problems[1:] == [
        "model.safetensors: the values of params/body.weight are not those saved"
    ]


@pytest.mark.parametrize("leaf", ["opt_state/m/tied", "opt_state/dtypes/complex128"])
def test_a_leaf_that_was_something_else_is_noticed(root, leaf):
    assert verify(root / "checkpoint-10", leaves=True) == []
    file = root / "checkpoint-10" / "manifest.json"
    manifest = parse_manifest(file.read_bytes())
    manifest.leaves[leaf] = "0" * 64  # as a mistake in writing would
    file.write_bytes(manifest.render())
    problems = [f"optimizer.safetensors: the values of {leaf} are not those saved"]
    assert verify(root / "checkpoint-10") == problems


@pytest.mark.parametrize("leaves", [False, True])
def test_a_leaf_that_is_in_no_file_is_noticed(root, leaves):
    file = root / "checkpoint-10" / "manifest.json"
    manifest = parse_manifest(file.read_bytes())
    manifest.leaves["params/more"] = "0" * 64
    file.write_bytes(manifest.render())
    problems = ["optimizer.safetensors: params/more is not in it"]
    assert verify(root / "checkpoint-10", leaves=leaves) == problems


def test_a_file_that_is_consistent_but_of_another_checkpoint_is_noticed(root):
    for name in FILES[:-3]:
        if name != "manifest.json":
            shutil.copy(root / "checkpoint-5" / name, root / "checkpoint-10" / name)
    names = {problem.split(":")[0] for problem in verify(root / "checkpoint-10")}
    assert names == {*FILES[:1], *FILES[3:5], "train_state.json"}


def test_many_problems_are_summed_up(root):
    for name in FILES[:-3]:
        if name != "manifest.json":
            (root / "checkpoint-10" / name).unlink()
    (root / "checkpoint-10" / "host_rng-0.json").unlink()
    (root / "checkpoint-10" / "host_rng-1.json").unlink()
    assert len(verify(root / "checkpoint-10")) == 10
    with pytest.raises(CheckpointError, match="and 2 more\nResume from another one"):
        load(root / "checkpoint-10")


def test_the_newest_that_verifies_is_chosen(root):
    assert newest(root) == (root / "checkpoint-10", [])


def test_empty_and_foreign_folders_are_passed_over_with_the_reason(root):
    (root / "checkpoint-99").mkdir()
    (root / "checkpoint-98").mkdir()
    (root / "checkpoint-98" / "model.safetensors").write_bytes(b"")
    (root / ".tmp-checkpoint-100-1").mkdir()
    (root / "checkpoint-best").mkdir()
    (root / "checkpoint-97").write_text("a file")
    path, skipped = newest(root)
    assert path == root / "checkpoint-10"
    assert [p.name for p, _ in skipped] == ["checkpoint-99", "checkpoint-98"]
    assert "the save was cut off, or another program wrote this folder" in skipped[0][1]


def test_a_renamed_folder_does_not_win_by_its_name(root):
    (root / "checkpoint-5").rename(root / "checkpoint-50")
    path, skipped = newest(root)
    assert path == root / "checkpoint-10"
    assert skipped[0][1] == "checkpoint-50: it holds step 5; the folder was renamed"
    assert load(root / "checkpoint-50").manifest.step == 5  # asked for by name it is fine


def test_modification_times_play_no_role(root):
    os.utime(root / "checkpoint-5", (4e9, 4e9))
    assert newest(root)[0] == root / "checkpoint-10"


def test_a_moved_root_still_works(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("b") / "moved"
    shutil.copytree(root, elsewhere)
    assert verify(elsewhere / "checkpoint-10") == []


def test_files_that_others_add_are_not_looked_at(root):
    (root / "checkpoint-10" / "notes.txt").write_text("mine")
    assert verify(root / "checkpoint-10") == []


def test_nothing_there(tmp_path):
    assert newest(tmp_path / "absent") == (None, [])
    assert list_checkpoints(tmp_path / "absent") == []
    assert verify(tmp_path / "absent") == [f"{tmp_path / 'absent'}: no such folder"]
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "absent")


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-x",
        ".checkpoint-1",
    ):
        (tmp_path / name).mkdir()
    steps = [path.name for path in list_checkpoints(tmp_path)]
    assert steps == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_a_manifest_of_a_newer_format_says_so(root):
    file = root / "checkpoint-10" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    assert verify(root / "checkpoint-10")[0].startswith(
        "manifest.json: it has format 2, this version"
    )


def test_a_manifest_with_a_duplicate_key_is_damaged(root):
    file = root / "checkpoint-10" / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"{", b'{\n "step": 9,', 1))
    assert "its checksum does not fit" in verify(root / "checkpoint-10")[0]


def test_the_state_is_put_on_the_device(root):
    device = "cuda" if torch.cuda.is_available() else "meta"
    state = load(root / "checkpoint-10", device=device).state
    assert {t.device.type for t in ts.tree.leaves(state) if isinstance(t, torch.Tensor)} == {device}
