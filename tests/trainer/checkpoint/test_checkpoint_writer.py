"""What a save writes, what comes back, and what it refuses."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainstep as ts
from trainer.checkpoint import CheckpointError, io, load, newest, save, verify
from trainstep.compare import leaf_digest
from trainstep.serialize import check_like, to_flat


def test_every_leaf_comes_back_with_the_same_bits(tmp_path, make):
    state = make.state()
    path = save(tmp_path / "runs" / "a", 3, make.contents(state))
    assert path == tmp_path / "runs" / "a" / "checkpoint-3"
    assert verify(path) == verify(path, leaves=True) == []
    loaded = load(path)
    assert ts.diff(loaded.state, state) == []
    check_like(loaded.state, state)
    assert loaded.state.extras["list"][1] == (1, None, "text", 0.1, float("-inf"))
    assert loaded.state.key == state.key


def test_the_rest_comes_back(tmp_path, make):
    contents = make.contents(make.state())
    loaded = load(save(tmp_path, 3, contents))
    assert loaded.path == tmp_path / "checkpoint-3"
    assert loaded.position == contents.position
    assert loaded.trainer_state == contents.trainer_state
    assert loaded.arguments == contents.arguments
    assert loaded.host_rng == contents.host_rng
    assert (loaded.manifest.step, loaded.manifest.world_size) == (3, 2)
    assert loaded.manifest.versions["torch"] == torch.__version__


def test_loaded_leaves_share_no_memory(tmp_path, make):
    state = make.state()
    state = state.evolve(buffers={**state.buffers, "scale": state.params["scale"]})
    loaded = load(save(tmp_path, 3, make.contents(state))).state
    loaded.params["tied"].zero_()
    assert torch.equal(loaded.buffers["tied_too"], state.buffers["tied_too"])
    loaded.params["scale"].fill_(9)  # both were found in the model's file, under one name
    assert torch.equal(loaded.buffers["scale"], state.buffers["scale"])


def test_the_folder_holds_these_files_and_the_manifest_names_them(tmp_path, make):
    path = save(tmp_path, 3, make.contents(make.state()))
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files == {
        *("model.safetensors", "config.json", "processor/vocab.txt"),
        *("optimizer.safetensors", "weights.safetensors"),
        *("train_state.json", "trainer_state.json", "training_args.json", "manifest.json"),
        *("host_rng-0.json", "host_rng-1.json"),
    }
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == files - {"manifest.json"}
    for name, entry in listed.items():
        data = (path / name).read_bytes()
        if name.endswith(".safetensors"):
            assert (entry["size"], entry["of"]) == (len(data), "tensors")
        else:
            sha = hashlib.sha256(data).hexdigest()
            assert entry == {"size": len(data), "sha256": sha, "of": "bytes"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_manifest_holds_every_leaf_digest(tmp_path, make):
    state = make.state()
    manifest = load(save(tmp_path, 3, make.contents(state))).manifest
    flat = to_flat(state)[0]
    leaves = {path: leaf_digest(path, leaf.resolve_conj()).hex() for path, leaf in flat.items()}
    assert manifest.leaves == leaves


def test_weights_in_the_model_file_are_not_stored_twice(tmp_path, make):
    state = make.state()
    path = save(tmp_path, 3, make.contents(state))
    in_model = {"params/body.weight", "params/transposed", "params/scale", "buffers/count"}
    weights = {leaf for leaf in to_flat(state)[0] if leaf.startswith(("params/", "buffers/"))}
    assert set(load_file(path / "weights.safetensors")) == weights - in_model
    assert set(load_file(path / "optimizer.safetensors")) == set(to_flat(state)[0]) - weights


def test_a_model_file_with_all_weights_leaves_nothing_over(tmp_path, make):
    state = make.state()
    path = save(tmp_path, 3, make.contents(state, model_tensors={**state.params, **state.buffers}))
    assert not (path / "weights.safetensors").exists()
    assert ts.diff(load(path).state, state) == []


@pytest.mark.parametrize(
    "change",
    [lambda w: w.to(torch.bfloat16), lambda w: w.reshape(6, 4), lambda w: w + 1e-7],
    ids=["dtype", "shape", "value"],
)
def test_a_model_file_that_differs_from_the_state_loses_nothing(tmp_path, make, change):
    state = make.state()
    altered = {"body.weight": change(state.params["body.weight"]), "scale": state.params["scale"]}
    path = save(tmp_path, 3, make.contents(state, model_tensors=altered))
    stored = load_file(path / "weights.safetensors")
    assert "params/body.weight" in stored
    assert "params/scale" not in stored
    assert torch.equal(load_file(path / "model.safetensors")["body.weight"], altered["body.weight"])
    assert verify(path, leaves=True) == []
    assert ts.diff(load(path).state, state) == []


def test_a_weight_in_two_files_is_read_from_the_first(tmp_path, make):
    state = make.state()

    def write(folder: Path) -> None:
        for name in ("b.safetensors", "a.safetensors", "c.safetensors"):
            save_file({"body.weight": state.params["body.weight"]}, folder / name)

    path = save(tmp_path, 3, make.contents(state, write_model=write, model_tensors=None))
    where = json.loads((path / "train_state.json").read_text())["where"]
    assert where["params/body.weight"] == ["a.safetensors", "body.weight"]
    assert ts.diff(load(path).state, state) == []


def test_shards_are_found(tmp_path, make):
    state = make.state()

    def write_shards(folder: Path) -> None:
        for number, name in enumerate(("body.weight", "scale"), 1):
            file = folder / f"model-{number:05d}-of-00002.safetensors"
            save_file({name: state.params[name].clone()}, file)
        (folder / "model.safetensors.index.json").write_text("{}")

    contents = make.contents(state, write_model=write_shards, model_tensors=None)
    path = save(tmp_path, 3, contents)
    stored = load_file(path / "weights.safetensors")
    assert not {"params/body.weight", "params/scale"} & set(stored)
    assert ts.diff(load(path).state, state) == []
    (path / "model-00002-of-00002.safetensors").unlink()
    assert verify(path) == ["model-00002-of-00002.safetensors: missing"]


def test_a_model_in_another_format_is_hashed_and_the_state_complete(tmp_path, make):
    state = make.state()

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"\x00" * 100)

    path = save(tmp_path, 3, make.contents(state, write_model=write, model_tensors=None))
    assert ts.diff(load(path).state, state) == []
    (path / "weights.bin").write_bytes(b"\x00" * 99 + b"\x01")
    assert [p.split(":")[0] for p in verify(path)] == ["weights.bin"]


def test_only_the_model(tmp_path, make):
    path = save(tmp_path, 3, make.contents(None))
    assert not (path / "optimizer.safetensors").exists()
    loaded = load(path)
    assert loaded.state is None
    assert loaded.position["epoch"] == 1
    assert loaded.manifest.leaves == {}


@pytest.mark.row(81)
def test_no_file_is_a_pickle(tmp_path, make):
    path = save(tmp_path, 3, make.contents(make.state()))
    for file in path.rglob("*"):
        assert file.is_dir() or file.suffix in {".json", ".safetensors", ".txt"}


def test_the_same_contents_give_the_same_bytes(tmp_path, make):
    paths = [save(tmp_path / run, 3, make.contents(make.state())) for run in "ab"]
    first, second = ({p.name: p.read_bytes() for p in path.glob("*.*")} for path in paths)
    assert first == second


def test_saving_a_step_again_replaces_it(tmp_path, make):
    save(tmp_path, 3, make.contents(make.state()))
    other = make.state(seed=1)
    path = save(tmp_path, 3, make.contents(other))
    assert ts.equal(load(path).state, other)
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_folder_of_the_same_step_is_replaced(tmp_path, make):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "leftover").write_text("x")
    path = save(tmp_path, 3, make.contents(make.state()))
    assert verify(path) == []
    assert not (path / "leftover").exists()


def test_a_save_does_not_change_the_state(tmp_path, make):
    state = make.state()
    before, versions = make.state(), [t._version for t in to_flat(state)[0].values()]
    save(tmp_path, 3, make.contents(state))
    assert ts.diff(state, before) == []
    assert [t._version for t in to_flat(state)[0].values()] == versions


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, make, disk):
    disk.arm(None)
    save(tmp_path, 3, make.contents(make.state()))
    names = [name for name, _ in disk.log]
    renamed = max(at for at, name in enumerate(names) if name == "rename")
    temporary = disk.log[renamed][1]
    synced = {path for name, path in disk.log[:renamed] if name.startswith("sync")}
    final = tmp_path / "checkpoint-3"
    expected = {temporary / p.relative_to(final) for p in final.rglob("*")} | {temporary}
    expected.remove(temporary / "optimizer.safetensors")
    assert synced == expected | {temporary / ".optimizer.safetensors"}
    assert disk.log[renamed + 1] == ("sync_folder", tmp_path)
    writes = [path.name for name, path in disk.log if name == "create"]
    assert writes[-1] == "manifest.json"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free some space or lower save_total_limit"),
        (
            errno.EROFS,
            "Read-only file system. Make the folder writable or choose another output_dir",
        ),
        (errno.EIO, "Input/output error. Check the disk"),
    ],
)
def test_a_disk_that_refuses_is_named(tmp_path, make, monkeypatch, code, advice):
    save(tmp_path, 2, make.contents(make.state()))

    def refuse(file: object, data: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(io, "write", refuse)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 3, make.contents(make.state()))
    assert f"{tmp_path / 'checkpoint-3'}: it could not be written" in str(caught.value)
    assert advice in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_and_stays_as_it_is(tmp_path, make):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Make the folder writable"):
        save(tmp_path, 3, make.contents(make.state()))
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_an_error(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file", 3, make.contents(make.state()))


def test_the_space_running_out_in_the_model_file_is_an_error(tmp_path, make):
    def write(folder: Path) -> None:
        save_file({"w": torch.ones(2)}, folder / "absent" / "model.safetensors")

    contents = make.contents(make.state(), write_model=write, model_tensors=None)
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 3, contents)
    assert list(tmp_path.iterdir()) == []


def test_a_bug_in_write_model_is_not_disguised(tmp_path, make):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        save(tmp_path, 3, make.contents(make.state(), write_model=write, model_tensors=None))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_file_is_refused(tmp_path, make):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"no header here")

    with pytest.raises(
        CheckpointError, match=r"write_model left a file .* format, model\.safetensors: its"
    ):
        save(tmp_path, 3, make.contents(make.state(), write_model=write, model_tensors=None))


@pytest.mark.parametrize("name", ["train_state.json", "optimizer.safetensors"])
def test_write_model_may_not_take_the_names_of_the_checkpoint(tmp_path, make, name):
    def write(folder: Path) -> None:
        save_file({"w": torch.ones(2)}, folder / name)

    with pytest.raises(CheckpointError, match=f"File exists.*{name}"):
        save(tmp_path, 3, make.contents(make.state(), write_model=write, model_tensors=None))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"position": {"at": torch.ones(1)}},
            r"train_state\.json \(data position\): not a JSON value",
        ),
        (
            {"arguments": {"x": {1: 2}}},
            r"training_args\.json: not a JSON value: key 1 is not a string",
        ),
        ({"host_rng": {4: {"x": b""}}}, r"host_rng-4\.json: not a JSON value"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_writing(tmp_path, make, disk, changes, text):
    disk.arm(None)
    with pytest.raises(CheckpointError, match=text):
        save(tmp_path, 3, make.contents(make.state(), **changes))
    assert disk.log == []


def test_leaves_without_data_are_refused(tmp_path, make):
    state = make.state().evolve(params={"w": torch.ones(3, device="meta")})
    with pytest.raises(
        CheckpointError, match=r"params/w: a Tensor on meta.*gather it before saving"
    ):
        save(tmp_path, 3, make.contents(state, model_tensors={"w": torch.ones(1)}))


def test_an_older_layout_of_the_state_is_an_error(tmp_path, make, monkeypatch):
    path = save(tmp_path, 3, make.contents(make.state()))
    monkeypatch.setattr("trainstep.serialize.FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"version of trainstep in manifest\.json"):
        load(path)


def test_what_killed_saves_left_is_removed(tmp_path, make):
    dead = 2**22 + 1  # above the largest process id
    names = [f".tmp-checkpoint-7-{dead}", f".gone-checkpoint-8-{dead}", ".tmp-checkpoint-3-1"]
    stays = [".tmp-checkpoint-9-1", "checkpoint-foo", ".tmp-other"]
    for name in names + stays:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    save(tmp_path, 3, make.contents(make.state()))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stays, "checkpoint-3"])


def test_a_checkpoint_that_was_set_aside_is_found_and_put_back(tmp_path, make):
    old = make.state(seed=5)
    path = save(tmp_path, 3, make.contents(old))
    aside = tmp_path / f".old-checkpoint-3-{2**22 + 1}"
    path.rename(aside)
    assert newest(tmp_path) == (aside, [])
    assert ts.equal(load(aside).state, old)
    save(tmp_path, 4, make.contents(make.state()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert ts.equal(load(tmp_path / "checkpoint-3").state, old)


def test_a_set_aside_checkpoint_counts_while_its_successor_is_broken(tmp_path, make):
    old = make.state(seed=5)
    path = save(tmp_path, 3, make.contents(old))
    aside = tmp_path / f".old-checkpoint-3-{os.getpid()}"
    shutil.copytree(path, aside)
    (path / "manifest.json").unlink()
    assert newest(tmp_path)[0] == aside
    new = make.state(seed=6)
    assert ts.equal(load(save(tmp_path, 3, make.contents(new))).state, new)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
