"""Checkpoints of sharded training: parts on the disk, other numbers of processes, other engines."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file

import trainstep as ts
from support.ranks.launch import launch, start, wait
from support.ranks.sharded import long_run, stacked, whole
from trainer.checkpoint import CheckpointError, consolidate, is_in_pieces, load, newest, verify
from trainer.checkpoint.manifest import parse_manifest
from trainer.checkpoint.source import Source
from trainer.cli.entry import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes saved and found, and where it is."""
    folder = tmp_path_factory.mktemp("two")
    found = launch(2, "sharded", folder, "saves,foreign").found
    assert found[0] == found[1]
    return folder, found[0]


@pytest.mark.row(156)
def test_each_process_writes_its_own_part_without_pickles(saved: Any) -> None:
    folder, found = saved
    assert len(set(found["saves"].values())) == 1  # how a run saves changes nothing in it
    parts = folder / "saves" / "parts" / "checkpoint-4"
    names = {path.name for path in parts.iterdir()}
    assert names == {
        *("state-0.safetensors", "state-1.safetensors", "host_rng-0.json", "host_rng-1.json"),
        *("manifest.json", "train_state.json", "trainer_state.json", "training_args.json"),
    }
    sizes = [(parts / f"state-{rank}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.3 * min(sizes)
    for kind in ("parts", "threads", "whole", "whole threads"):
        for checkpoint in sorted((folder / "saves" / kind).glob("checkpoint-*")):
            assert verify(checkpoint, leaves=True) == []
            assert is_in_pieces(checkpoint) == (kind in ("parts", "threads"))


def test_an_override_of_save_writes_whole_weights(saved: Any) -> None:
    for checkpoint in sorted((saved[0] / "saves" / "own").glob("checkpoint-*")):
        assert verify(checkpoint, leaves=True) == []
        names = (checkpoint / "note.txt").read_text().split()
        assert set(load_file(checkpoint / "model.safetensors")) <= set(names)


@pytest.mark.parametrize(("now", "later"), [("parts", "threads"), ("whole", "whole threads")])
def test_threads_write_the_bytes_that_are_written_at_once(saved: Any, now: str, later: str) -> None:
    root = saved[0] / "saves"
    for step in (2, 4, 6, 8):
        files = [
            {
                name: file
                for name, file in parse_manifest(
                    (root / kind / f"checkpoint-{step}" / "manifest.json").read_bytes()
                ).files.items()
                if name not in ("trainer_state.json", "training_args.json")  # times; async_save
            }
            for kind in (now, later)
        ]
        assert files[0] == files[1]


def test_parts_and_wholes_hold_the_same_state(saved: Any) -> None:
    root = saved[0] / "saves"
    for step in (2, 8):
        states = [load(root / kind / f"checkpoint-{step}").state for kind in ("parts", "whole")]
        assert ts.diff(*states) == []
    assert ts.digest(states[0]) == saved[1]["saves"]["parts"]


def test_runs_go_on_with_the_same_and_with_other_numbers_of_processes(
    saved: Any, tmp_path: Path
) -> None:
    folder, found = saved
    root = folder / "saves"
    parts, all_of_it = (str(root / kind / "checkpoint-4") for kind in ("parts", "whole"))
    alone = long_run(tmp_path / "alone", save_strategy="steps", save_steps=4)
    alone.train()
    local = str(tmp_path / "alone" / "checkpoint-4")
    reference = load(root / "parts" / "checkpoint-8").state
    assert reference is not None

    # From one process's checkpoint as well, on two and on four.
    same = launch(2, "sharded", tmp_path / "same", "resumed", parts, all_of_it, local).found
    for one in same:
        assert one["resumed"].keys() == {parts, all_of_it, local}
        for path in (parts, all_of_it):
            assert one["resumed"][path] == found["saves"]["parts"]  # the uninterrupted run's bits
    # With whole models from there to step 6 and 8, and from 6 with parts again.
    for one in same:
        for weights in one["there and back"].values():
            for name, tensor in reference.params.items():
                assert_allclose(weights[name], tensor, rtol=0, atol=2e-6, err_msg=name)
    four = launch(4, "sharded", tmp_path / "four", "resumed", parts, all_of_it, local).found
    assert all(one == four[0] for one in four)
    assert four[0]["resumed"][parts] == four[0]["resumed"][all_of_it]
    for path in (parts, all_of_it):
        trainer = long_run(tmp_path / "resumed")
        trainer.train(resume_from_checkpoint=path)
        weights = whole(trainer)
        for name, tensor in reference.params.items():
            assert_allclose(weights[name], tensor, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.row(191)
def test_a_run_goes_on_after_a_process_was_killed_while_it_saved(
    saved: Any, tmp_path: Path
) -> None:
    died = wait(start(2, "sharded", tmp_path, "killed"), 2, tmp_path, limit=150)
    assert died.status != 0
    assert died.found == [None, None]
    assert "SIGKILL" in died.output
    path, passed_over = newest(tmp_path / "killed")
    assert path == tmp_path / "killed" / "checkpoint-2"
    assert passed_over == []
    found = launch(2, "sharded", tmp_path / "again", "resumed", str(path)).found
    for one in found:
        assert list(one["resumed"].values()) == [saved[1]["saves"]["parts"]]


def test_one_process_loads_the_best_model_from_parts(saved: Any, tmp_path: Path) -> None:
    checkpoint = saved[0] / "saves" / "parts" / "checkpoint-8"
    trainer = long_run(tmp_path)
    trainer._load_model(checkpoint)
    state = load(checkpoint).state
    assert state is not None
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    for name, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(named[name], tensor)


def test_an_optimizer_that_runs_itself_and_the_best_model(saved: Any) -> None:
    found = saved[1]["foreign"]
    assert len(set(found["digests"])) == 1
    for kind in ("parts", "whole"):
        best, last, loaded = found[f"best {kind}"]
        assert best < last
        assert loaded == pytest.approx(best, abs=1e-6)


def test_save_model_and_consolidate_give_the_same_file(saved: Any, tmp_path: Path) -> None:
    root = saved[0] / "saves"
    written = load_file(root / "parts" / "model" / "model.safetensors")
    for source in ("parts", "threads"):
        path = consolidate(root / source / "checkpoint-8", tmp_path / source)
        assert [one.name for one in path.parent.iterdir()] == ["model.safetensors"]
        put_together = load_file(path)
        assert put_together.keys() == written.keys()
        assert all(torch.equal(put_together[name], written[name]) for name in written)
    model = stacked()
    missing, unexpected = model.load_state_dict(put_together, strict=False)
    assert (missing, unexpected) == (["body.tied.weight"], [])  # stored once, under its first name


def test_consolidation_holds_one_tensor_at_a_time(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    most = 0
    assemble = Source.assemble

    def watched(source: Source, leaf: str) -> torch.Tensor:
        nonlocal most
        tensor = assemble(source, leaf)
        held.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in held))
        return tensor

    monkeypatch.setattr(Source, "assemble", watched)
    path = consolidate(saved[0] / "saves" / "parts" / "checkpoint-8", tmp_path)
    assert len(held) == len(load_file(path)) > 10
    assert most <= 2  # the one that is written, and the next


def test_the_command_writes_into_the_checkpoint_which_stays_whole(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved[0] / "saves" / "parts" / "checkpoint-8", checkpoint)
    assert main(["consolidate", str(checkpoint), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == str(checkpoint / "model.safetensors")
    assert told["size"] == (checkpoint / "model.safetensors").stat().st_size
    assert verify(checkpoint) == []
    assert main(["consolidate", str(checkpoint)]) == 0  # again, over the file that is there
    assert capsys.readouterr().out.startswith(f"{checkpoint / 'model.safetensors'}: ")
    assert sorted(p.name for p in checkpoint.glob(".*")) == []
    assert main(["inspect", str(checkpoint), "--leaves"]) == 0
    shown = capsys.readouterr().out
    assert "format      sharded" in shown
    assert "none: saved in pieces" in shown
    assert main(["replay", str(checkpoint), "--script", "train.py"]) == 2
    assert "as it has no digest: saved in pieces" in capsys.readouterr().err
    (checkpoint / "state-1.safetensors").unlink()
    assert main(["consolidate", str(checkpoint)]) == 2
    assert "state-1.safetensors" in capsys.readouterr().err
    whole_one = saved[0] / "saves" / "whole" / "checkpoint-8"
    assert main(["consolidate", str(whole_one), "--out", str(tmp_path / "copied")]) == 0
    assert (tmp_path / "copied" / "model.safetensors").exists()
    assert not (tmp_path / "copied" / "optimizer.safetensors").exists()


def test_every_damaged_byte_is_found_when_its_piece_is_read(saved: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved[0] / "saves" / "parts" / "checkpoint-8", checkpoint)
    file = checkpoint / "state-1.safetensors"
    good = file.read_bytes()
    texts = json.loads((checkpoint / "train_state.json").read_text())
    manifest = parse_manifest((checkpoint / "manifest.json").read_bytes())
    for place in range(8, len(good), 97):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert verify(checkpoint) != [], place
        read, told = read_all(Source.of_checkpoint(checkpoint, manifest, texts))
        assert all("state-1.safetensors" in text for text in told)
        file.write_bytes(good)
        # What was read in spite of it is what was saved.
        fresh, none = read_all(Source.of_checkpoint(checkpoint, manifest, texts))
        assert none == []
        assert all(torch.equal(read[leaf], fresh[leaf]) for leaf in read)
        assert told or read.keys() == fresh.keys()


def read_all(source: Source) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return what can be read, and what is said of the rest."""
    read, told = {}, []
    for leaf in source.whole:
        try:
            read[leaf] = source.assemble(leaf)
        except CheckpointError as error:
            told.append(str(error))
    return read, told
