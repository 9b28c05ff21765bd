"""Rotation deletes by step, and never what is still needed."""

import os
import shutil

import pytest

import trainer.checkpoint.rotation as rotation
from trainer.checkpoint import CheckpointError, io, newest, rotate, save


@pytest.fixture
def root(tmp_path, make):
    """Checkpoints of steps 9, 10, 20 and 30."""
    first = save(tmp_path, 9, make.contents(make.state()))
    for step in (10, 20, 30):
        shutil.copytree(first, tmp_path / f"copy-{step}")
        shutil.rmtree(tmp_path / f"copy-{step}")
        save(tmp_path, step, make.contents(make.state()))
    return tmp_path


def steps(root) -> list[int]:
    return sorted(int(p.name.removeprefix("checkpoint-")) for p in root.glob("checkpoint-[0-9]*"))


def test_the_oldest_by_step_go(root):
    assert rotate(root, 2) == [root / "checkpoint-9", root / "checkpoint-10"]
    assert steps(root) == [20, 30]
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("limit", [None, 0, -1, 4, 100])
def test_no_limit_or_room_left_deletes_nothing(root, limit):
    assert rotate(root, limit) == []
    assert steps(root) == [9, 10, 20, 30]


def test_modification_times_play_no_role(root):
    for step, time in ((9, 500), (10, 300), (20, 100), (30, 200)):
        os.utime(root / f"checkpoint-{step}", (time, time))
    rotate(root, 1)
    assert steps(root) == [30]


@pytest.mark.parametrize("spelled", ["path", "name", "relative", "other way"])
def test_the_kept_stay_however_they_are_spelled(root, spelled, monkeypatch):
    monkeypatch.chdir(root.parent)
    kept = {
        "path": root / "checkpoint-9",
        "name": "checkpoint-9",
        "relative": f"{root.name}/checkpoint-9",
        "other way": root / ".." / root.name / "checkpoint-9",
    }[spelled]
    assert rotate(root, 2, keep=[kept]) == [root / "checkpoint-10", root / "checkpoint-20"]
    assert steps(root) == [9, 30]


def test_limit_one_leaves_the_best_and_the_newest(root):
    rotate(root, 1, keep=[root / "checkpoint-10"])
    assert steps(root) == [10, 30]


def test_the_newest_that_verifies_stays_though_broken_ones_are_newer(root):
    (root / "checkpoint-30" / "manifest.json").unlink()
    (root / "checkpoint-20" / "optimizer.safetensors").write_bytes(b"")
    rotate(root, 2)
    assert steps(root) == [10, 30]
    rotate(root, 1)
    assert steps(root) == [10]
    assert newest(root)[0] == root / "checkpoint-10"


def test_if_none_verifies_the_highest_step_stays(root):
    for step in (9, 10, 20, 30):
        (root / f"checkpoint-{step}" / "manifest.json").unlink()
    rotate(root, 1)
    assert steps(root) == [30]


def test_one_just_saved_is_not_read_again_and_stays(root, monkeypatch):
    def refuse(root):
        raise AssertionError("read again")

    monkeypatch.setattr(rotation, "newest", refuse)
    rotate(root, 2, saved=root / "checkpoint-30")
    assert steps(root) == [20, 30]


def test_one_just_saved_below_the_highest_step_stays_as_well(root):
    rotate(root, 1, saved=root / "checkpoint-10")
    assert steps(root) == [10, 30]


def test_other_things_in_the_folder_stay(root):
    (root / "checkpoint-foo").mkdir()
    (root / "checkpoint-1").write_text("a file")
    (root / "runs").mkdir()
    rotate(root, 1)
    names = sorted(p.name for p in root.iterdir())
    assert names == ["checkpoint-1", "checkpoint-30", "checkpoint-foo", "runs"]


def test_a_link_is_removed_and_not_what_it_points_to(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    (root / "checkpoint-9").rename(elsewhere)
    (root / "checkpoint-9").symlink_to(elsewhere)
    rotate(root, 3)
    assert steps(root) == [10, 20, 30]
    assert (elsewhere / "manifest.json").exists()


def test_one_that_cannot_be_deleted_is_named_and_the_others_go(root, monkeypatch):
    rename = io.rename

    def refuse(source, target):
        if source.name == "checkpoint-9":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(io, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint-9: .*Permission denied\nDelete them by"):
        rotate(root, 2)
    assert steps(root) == [9, 20, 30]


def test_a_deletion_that_is_cut_off_leaves_no_half_under_its_name(root, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "unlink", die)
    with pytest.raises(KeyboardInterrupt):
        rotate(root, 3)
    assert steps(root) == [10, 20, 30]
    monkeypatch.undo()
    assert rotate(root, 2) == [root / "checkpoint-10"]
