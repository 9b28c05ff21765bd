"""Hugging Face's file names: nothing of our exactness is lost, and folders of theirs are taken up."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainstep as ts
from support.shell import At, make_trainer, outcome, samples, scored, stop, weights
from trainer import CheckpointError, TrainingArguments, checkpoint, hf_checkpoints
from trainer.checkpoint import host_rng
from trainer.checkpoint.hf_format import HfParts
from trainer.checkpoint.hf_reader import read_pickle
from trainer.checkpoint.manifest import parse_manifest
from trainstep.serialize import to_flat

OURS = ("manifest.json", "train_state.json", "training_args.json", "host_rng-0.json")
THEIRS = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    "training_args.bin",
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def hf_trainer(folder: Path, model: Any = None, **changes: Any) -> Any:
    """A Trainer of 8 steps that saves every second one under Hugging Face's names."""
    settings = {
        "train": samples(8),
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "checkpoint_format": "hf",
        **changes,
    }
    return make_trainer(folder, scored() if model is None else model, **settings)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def strip(folder: Path) -> Path:
    """Take our own files away: what is left is what the Hugging Face Trainer would have written."""
    for name in OURS:
        (folder / name).unlink()
    return folder


# ---- what is written


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, hub_token="secret", weight_decay=0.1)
    trainer.add_callback(At("save", 8, lambda control: None))
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    assert names(folder) == {*OURS, *THEIRS}
    assert checkpoint.verify(folder) == checkpoint.verify(folder, leaves=True) == []

    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    shown = trainer.optimizer.state_dict()
    assert optimizer["param_groups"] == shown["param_groups"]
    assert optimizer["state"].keys() == shown["state"].keys()
    for index, kept in shown["state"].items():
        assert optimizer["state"][index].keys() == kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, tensor in kept.items():
            assert torch.equal(optimizer["state"][index][key], tensor)
    scheduler = torch.load(folder / "scheduler.pt", weights_only=True)
    assert (scheduler["last_epoch"], scheduler["_step_count"]) == (8, 9)
    arguments = torch.load(folder / "training_args.bin", weights_only=False)
    assert type(arguments) is TrainingArguments
    assert (arguments.weight_decay, arguments.hub_token) == (0.1, None)
    assert b"secret" not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_the_random_state_is_that_of_the_host(tmp_path: Path) -> None:
    hf_trainer(tmp_path).train()
    random_state = read_pickle(tmp_path / "checkpoint-8" / "rng_state.pth")
    kept = json.loads((tmp_path / "checkpoint-8" / "host_rng-0.json").read_bytes())
    objects = host_rng.as_objects(kept)
    assert random_state["python"] == objects["python"]
    assert random_state["numpy"][1].tolist() == objects["numpy"][1].tolist()
    assert random_state["numpy"][2:] == objects["numpy"][2:]
    assert torch.equal(random_state["cpu"], objects["torch"])


def test_nothing_is_stored_twice(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, on_nonfinite="skip")
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    found = checkpoint.load(folder)
    assert found.state is not None
    assert ts.digest(found.state) == ts.digest(trainer.train_state)
    where = json.loads((folder / "train_state.json").read_bytes())["where"]
    flat = to_flat(trainer.train_state)[0]
    for path in flat:
        file = where[path][0]
        assert (file == "model.safetensors") == path.startswith(("params/", "buffers/"))
        assert (file == "optimizer.pt") == path.startswith("opt_state/")
        assert (file == "extras.safetensors") == path.startswith("extras/")
    assert set(load_file(folder / "extras.safetensors")) == {p for p in flat if "extras/" in p}


def test_a_save_of_the_users_own_may_write_the_arguments(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path)
    save_model = trainer.save_model

    def save(folder: str, _internal_call: bool = False) -> None:
        save_model(folder, _internal_call=True)
        (Path(folder) / "training_args.bin").write_bytes(b"mine")

    trainer.save_model = save
    trainer.train()
    assert (tmp_path / "checkpoint-8" / "training_args.bin").read_bytes() == b"mine"
    assert checkpoint.verify(tmp_path / "checkpoint-8") == []


def test_the_environment_sets_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CHECKPOINT_FORMAT", "hf")
    make_trainer(tmp_path, save_strategy="epoch").train()
    assert (tmp_path / "checkpoint-5" / "optimizer.pt").exists()


def test_only_the_model(tmp_path: Path) -> None:
    hf_trainer(tmp_path, save_only_model=True).train()
    folder = tmp_path / "checkpoint-8"
    assert names(folder) == {
        *("model.safetensors", "trainer_state.json", "training_args.bin"),
        *("manifest.json", "train_state.json", "training_args.json"),
    }
    assert checkpoint.load(folder).state is None


def test_a_loss_scale_is_what_grad_scaler_keeps() -> None:
    scale = {"scale": torch.tensor(1024.0), "growth": torch.tensor(7, dtype=torch.int32)}
    state = ts.TrainState(3, {}, {}, {}, ts.rng.key(0), {"loss_scale": scale})
    scaler = torch.amp.GradScaler("cpu")
    kept = hf_checkpoints._scaler(state)
    assert kept is not None
    assert kept.keys() == scaler.state_dict().keys()
    scaler.load_state_dict(kept)
    assert (scaler.get_scale(), kept["_growth_tracker"]) == (1024.0, 7)


# ---- as exact as the other format


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("dropout", {"gradient_accumulation_steps": 2}),
        ("batch_norm", {"on_nonfinite": "skip", "lr_scheduler_type": "cosine"}),
        ("frozen", {"weight_decay": 0.1, "async_save": True}),
        ("dropout", {"optim": "sgd", "optim_args": "momentum=0.9"}),
        ("dropout", {"optim": "rmsprop"}),
        ("dropout", {"optim": "adagrad"}),
        ("dropout", {"optim": "adamw_torch", "eval_strategy": "steps", "eval_steps": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_checkpoint_leads_to_the_same_end(
    model: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"save_steps": 1, **settings}
    whole = hf_trainer(tmp_path / "whole", scored(model), **settings)
    expected = outcome(whole, whole.train())
    points = checkpoint.list_checkpoints(tmp_path / "whole")
    assert len(points) == whole.state.max_steps
    for point in points:
        trainer = hf_trainer(tmp_path / point.name, scored(model, seed=1), **settings)
        assert outcome(trainer, trainer.train(str(point))) == expected, point.name


def test_a_run_may_change_the_format_on_the_way(tmp_path: Path) -> None:
    whole = hf_trainer(tmp_path / "whole")
    expected = outcome(whole, whole.train())
    for number, form in enumerate(("safe", "hf", "safe", "hf")):
        halt = At("step_end", 2 * number + 2, stop)
        trainer = hf_trainer(tmp_path / "run", callbacks=[halt], checkpoint_format=form)
        result = trainer.train(resume_from_checkpoint=number > 0)
    assert outcome(trainer, result) == expected
    files = [
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").exists() for step in (2, 4, 6, 8)
    ]
    assert files == [False, True, False, True]


def test_in_the_background_the_bytes_are_the_same(tmp_path: Path) -> None:
    trainers = [hf_trainer(tmp_path / str(flag), async_save=flag) for flag in (False, True)]
    for trainer in trainers:
        trainer.train()
    folders = [tmp_path / str(flag) / "checkpoint-6" for flag in (False, True)]
    for name in {"model.safetensors", *THEIRS} - {"trainer_state.json", "training_args.bin"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_rotation_and_newest_do_not_mind_the_format(tmp_path: Path) -> None:
    hf_trainer(tmp_path, callbacks=[At("step_end", 4, stop)]).train()
    strip(tmp_path / "checkpoint-4")
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-4"
    trainer = hf_trainer(tmp_path, checkpoint_format="safe", save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-6"


# ---- damage and interruption


@pytest.mark.parametrize("name", [*OURS, *THEIRS, "extras.safetensors"])
def test_damage_is_noticed(name: str, tmp_path: Path) -> None:
    hf_trainer(tmp_path, max_steps=2, on_nonfinite="skip").train()
    file = tmp_path / "checkpoint-2" / name
    good = file.read_bytes()
    for number in range(12):
        place = number * (len(good) - 1) // 11
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :])
        problems = checkpoint.verify(file.parent)
        assert any(problem.startswith(f"{name}:") for problem in problems), (place, problems)
    for bad in (b"", good[:-1], good + b"x"):
        file.write_bytes(bad)
        assert checkpoint.verify(file.parent)
    file.unlink()
    assert [p.split(":")[0] for p in checkpoint.verify(file.parent)] == [name]
    with pytest.raises(CheckpointError, match=f"cannot be used:\n  {name}: missing"):
        checkpoint.load(file.parent)


def test_a_leaf_that_was_something_else_is_found_if_asked_for(tmp_path: Path) -> None:
    hf_trainer(tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    leaf = next(path for path in manifest.leaves if path.startswith("opt_state/"))
    manifest.leaves[leaf] = "0" * 64
    manifest.leaves["opt_state/more"] = "0" * 64
    (folder / "manifest.json").write_bytes(manifest.render())
    assert f"optimizer.pt: the values of {leaf} are not those saved" in (
        checkpoint.verify(folder, leaves=True)
    )


def contents_of(make: SimpleNamespace, step: int) -> checkpoint.Contents:
    """Return contents in this format, with moments in ``optimizer.pt`` and an extra beside."""
    weight = torch.full((3,), float(step))
    moments = {"m": weight * 2}
    state = ts.TrainState(step, {"w": weight}, {}, moments, ts.rng.key(0), {"e": weight * 3})
    optimizer = {"state": {0: {"exp_avg": moments["m"]}}, "param_groups": [{"params": [0]}]}
    parts = HfParts({"learning_rate": 0.1}, optimizer, {"last_epoch": step})

    def write_model(folder: Path) -> None:
        save_file({"w": weight}, folder / "model.safetensors")

    random_state = {0: host_rng.capture()}
    return make.contents(
        state,
        write_model=write_model,
        model_tensors=None,
        position={"index": step},
        host_rng=random_state,
        world_size=1,
        hf=parts,
    )


@pytest.mark.parametrize("mode", ["raise", "dead disk", "kill", "torn"])
def test_a_complete_checkpoint_remains_wherever_it_stops(
    tmp_path: Path, make: SimpleNamespace, disk: Any, killed: type[BaseException], mode: str
) -> None:
    before = tmp_path / "before"
    checkpoint.save(before, 5, contents_of(make, 5))
    disk.arm(None)
    checkpoint.save(shutil.copytree(before, tmp_path / "whole"), 10, contents_of(make, 10))
    calls = len(disk.log)
    assert calls > 40
    for at in range(calls):
        root = shutil.copytree(before, tmp_path / str(at))
        disk.arm(at, mode)
        with suppress(CheckpointError, killed):
            checkpoint.save(root, 10, contents_of(make, 10))
        disk.arm(None)
        path, skipped = checkpoint.newest(root)
        assert path is not None
        assert skipped == []
        state = checkpoint.load(path).state
        assert state is not None
        assert state.step in (5, 10)
        assert ts.equal(state, contents_of(make, state.step).state)


def test_several_ranks_have_a_random_state_each(tmp_path: Path, make: SimpleNamespace) -> None:
    contents = contents_of(make, 5)
    both = dict.fromkeys((0, 1), contents.host_rng[0])
    path = checkpoint.save(tmp_path, 5, make.contents(None, hf=HfParts({}), host_rng=both))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names(path)
    random_states = strip_and_load(path, "host_rng-1.json").host_rng
    assert random_states == both


def strip_and_load(path: Path, *more: str) -> checkpoint.Loaded:
    for name in more:
        (path / name).unlink()
    strip(path)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, path / name)
    shutil.copy(path / "model.safetensors", path.parent / "kept")
    (path / "trainer_state.json").write_text('{"global_step": 5}')
    return checkpoint.load(path)


# ---- folders without a manifest


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A checkpoint of step 2 as the Hugging Face Trainer would have written it."""
    hf_trainer(tmp_path, scored("mlp"), max_steps=2).train()
    return strip(tmp_path / "checkpoint-2")


def test_a_whole_one_verifies(foreign: Path) -> None:
    assert checkpoint.verify(foreign) == []
    found = checkpoint.load(foreign)
    assert found.foreign is not None
    assert (found.manifest.step, found.manifest.files, found.arguments) == (2, {}, {})
    assert found.state is None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "name", "text"),
    [
        (Path.unlink, "model.safetensors", "model.safetensors: missing"),
        (cut, "model.safetensors", "model.safetensors: it cannot be read: it holds"),
        (Path.unlink, "optimizer.pt", "optimizer.pt: missing"),
        (Path.unlink, "scheduler.pt", "scheduler.pt: missing"),
        (Path.unlink, "rng_state.pth", "rng_state*.pth: missing"),
        (cut, "optimizer.pt", "optimizer.pt: it cannot be read: File is not a zip file"),
        (cut, "rng_state.pth", "rng_state.pth: it cannot be read"),
        (Path.unlink, "trainer_state.json", "trainer_state.json: missing; it is written last"),
        (cut, "trainer_state.json", "trainer_state.json: it cannot be read"),
    ],
)
def test_what_can_be_noticed_of_a_folder_without_manifest(
    harm: Any, name: str, text: str, foreign: Path
) -> None:
    harm(foreign / name)
    problems = checkpoint.verify(foreign)
    assert len(problems) == 1
    assert problems[0].startswith(text)
    with pytest.raises(CheckpointError, match="cannot be used"):
        checkpoint.load(foreign)
    path, skipped = checkpoint.newest(foreign.parent)
    assert path is None
    assert skipped == [(foreign, problems[0])]


def test_a_flipped_bit_in_an_archive_is_noticed(foreign: Path) -> None:
    data = (foreign / "optimizer.pt").read_bytes()
    moments = read_pickle(foreign / "optimizer.pt")["state"][0]["exp_avg"]
    place = data.index(moments.numpy().tobytes())
    (foreign / "optimizer.pt").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert checkpoint.verify(foreign)[0].startswith("optimizer.pt: the checksum of ")


def test_an_unfinished_save_on_a_signal_is_noticed(foreign: Path) -> None:
    (foreign / "checkpoint-is-incomplete.txt").touch()
    assert checkpoint.verify(foreign) == ["checkpoint-is-incomplete.txt: the save was cut off"]


def test_a_renamed_folder_is_noticed(foreign: Path) -> None:
    moved = foreign.rename(foreign.with_name("checkpoint-7"))
    assert checkpoint.verify(moved) == ["checkpoint-7: it holds step 2; the folder was renamed"]


@pytest.mark.parametrize("kept", ["training_args.json", "optimizer.safetensors"])
def test_ours_without_its_manifest_is_damaged_and_not_theirs(kept: str, foreign: Path) -> None:
    (foreign / kept).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (foreign / name).unlink()
    assert checkpoint.verify(foreign)[0].startswith("manifest.json: missing")


def test_no_pickle_is_executed(foreign: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "attacked"),))

    torch.save(Attack(), foreign / "training_args.bin")
    trainer = hf_trainer(tmp_path / "run", scored("mlp"))
    trainer.train(str(foreign))  # it is not even opened
    torch.save({"state": Attack(), "param_groups": []}, foreign / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"cannot be used:\n  optimizer.pt: it cannot be read"
    ):
        hf_trainer(tmp_path / "run", scored("mlp")).train(str(foreign))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("shards", [False, True])
def test_a_run_goes_on_from_theirs(
    shards: bool, foreign: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = hf_trainer(tmp_path / "whole", scored("mlp"))
    whole.train()
    # Made anew: the schedule of the fixture's run is shorter.
    folder = strip(tmp_path / "whole" / "checkpoint-2")
    if shards:
        shard(folder)
    trainer = hf_trainer(tmp_path / "run", scored("mlp", seed=3))
    result = trainer.train(str(folder))

    assert ts.digest(trainer.train_state) == ts.digest(whole.train_state)
    assert [r["loss"] for r in trainer.state.log_history if "loss" in r] == [
        r["loss"] for r in whole.state.log_history if "loss" in r
    ]
    assert result.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"])
    assert "was written by the Hugging Face Trainer. It has no manifest" in caplog.text
    assert "training_args.bin is a pickle and is not opened" in caplog.text


def shard(folder: Path) -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number, name in enumerate(sorted(tensors)):
        where[name] = f"model-{number % 2 + 1:05}-of-00002.safetensors"
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_a_missing_shard_is_noticed(foreign: Path) -> None:
    shard(foreign)
    assert checkpoint.verify(foreign) == []
    (foreign / "model-00002-of-00002.safetensors").unlink()
    assert checkpoint.verify(foreign) == ["model-00002-of-00002.safetensors: missing"]


def test_only_a_model_of_theirs_starts_the_moments_anew(
    foreign: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (foreign / name).unlink()
    trainer = hf_trainer(tmp_path / "run", scored("mlp", seed=3), max_steps=2)
    trainer.train(str(foreign))
    stored = load_file(foreign / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights(trainer).items())
    assert "was saved with save_only_model: optimizer moments are not restored" in caplog.text


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        ("dropout", {}, r"does not fit Scored:\n  unexpected: body.2.bias"),
        ("frozen", {}, r"has groups of \[2, 2\] parameters, this one of \[1, 0\]"),
        ("mlp", {"optim": "sgd", "optim_args": "momentum=0.9"}, "keeps exp_avg, exp_avg_sq, step"),
        (
            "mlp",
            {"per_device_train_batch_size": 4},
            "batches of 2 on each device; with 4 the place",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(
    model: str, changes: dict[str, Any], text: str, foreign: Path, tmp_path: Path
) -> None:
    trainer = hf_trainer(tmp_path / "run", scored(model), **changes)
    with pytest.raises(ValueError, match=text):
        trainer.train(str(foreign))


def test_another_batch_size_may_begin_the_epoch_again(foreign: Path, tmp_path: Path) -> None:
    trainer = hf_trainer(
        tmp_path / "run", scored("mlp"), per_device_train_batch_size=4, ignore_data_skip=True
    )
    assert trainer.train(str(foreign)).global_step == 4
