"""Saves in a thread: same bytes, one at a time, no error lost."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import trainer.checkpoint.background as background
import trainstep as ts
from trainer.checkpoint import BackgroundWriter, CheckpointError, Contents, load, save, verify
from trainstep import tree


def files(path: Path) -> dict[str, bytes]:
    found = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def overwrite(state) -> None:
    """Change every tensor in place, as a donated step does."""
    for tensor in tree.leaves(state):
        if isinstance(tensor, torch.Tensor) and not tensor.dtype.is_complex and tensor.numel():
            if tensor.stride()[:1] == (0,):
                continue  # one value seen many times cannot be written in place
            tensor.view(-1).view(torch.uint8).fill_(1) if tensor.is_contiguous() else tensor.fill_(
                1
            )


@pytest.fixture
def gate(monkeypatch):
    """Hold saves in the thread until the gate is set."""
    opened = threading.Event()

    def held(*arguments):
        assert opened.wait(30)
        return save(*arguments)

    monkeypatch.setattr(background, "save", held)
    yield opened
    opened.set()


def test_the_same_bytes_although_the_state_changes_meanwhile(tmp_path, make, gate):
    expected = files(save(tmp_path / "sync", 3, make.contents(make.state())))
    state, position = (
        make.state(),
        {"epoch": 1, "index": 2**40, "fraction": 0.1, "nested": [1, None]},
    )
    writer = BackgroundWriter()
    writer.submit(tmp_path / "async", 3, make.contents(state, position=position))
    overwrite(state)
    position["nested"].append(2)
    gate.set()
    writer.wait()
    path = tmp_path / "async" / "checkpoint-3"
    assert files(path) == expected
    assert verify(path) == []
    assert ts.diff(load(path).state, make.state()) == []


def test_submit_does_not_wait_for_the_disk(tmp_path, make, gate):
    writer = BackgroundWriter()
    assert not writer.busy
    writer.submit(tmp_path, 3, make.contents(make.state()))
    assert writer.busy
    writer.check()
    assert list(tmp_path.iterdir()) == []
    gate.set()
    writer.wait()
    assert not writer.busy
    assert (tmp_path / "checkpoint-3").is_dir()


def test_one_is_in_flight(tmp_path, make, monkeypatch):
    running, most = [], []

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        result = save(*arguments)
        running.pop()
        return result

    monkeypatch.setattr(background, "save", watched)
    writer = BackgroundWriter()
    for step in range(4):
        writer.submit(tmp_path, step, make.contents(make.state()))
    writer.wait()
    assert most == [1, 1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 4


def test_on_done_gets_the_path_once_it_is_safe(tmp_path, make):
    seen = []
    writer = BackgroundWriter()
    contents = make.contents(make.state())
    writer.submit(tmp_path, 3, contents, lambda path: seen.append((path, verify(path))))
    writer.wait()
    assert seen == [(tmp_path / "checkpoint-3", [])]


@pytest.mark.parametrize("how", ["wait", "check", "submit"])
def test_an_error_surfaces_once(tmp_path, make, how):
    (tmp_path / "file").write_text("")
    seen = []
    writer = BackgroundWriter()
    writer.submit(tmp_path / "file", 3, make.contents(make.state()), seen.append)
    writer._thread.join()
    again = (tmp_path / "good", 4, make.contents(make.state()))
    call = {"wait": writer.wait, "check": writer.check, "submit": lambda: writer.submit(*again)}[
        how
    ]
    with pytest.raises(CheckpointError, match="could not be written"):
        call()
    assert seen == []
    writer.check()
    writer.submit(*again)
    writer.wait()
    assert verify(tmp_path / "good" / "checkpoint-4") == []


def test_an_error_in_on_done_surfaces_too(tmp_path, make):
    def fail(path):
        raise ValueError("bad hook")

    writer = BackgroundWriter()
    writer.submit(tmp_path, 3, make.contents(make.state()), fail)
    with pytest.raises(ValueError, match="bad hook"):
        writer.wait()


def test_what_shares_memory_is_copied_once(make):
    state = make.state()
    contents = make.contents(state, model_tensors=dict(state.params))
    copied = contents.frozen_copy()
    assert isinstance(copied, Contents)
    assert copied.model_tensors["body.weight"] is copied.state.params["body.weight"]
    assert copied.state.params["tied"] is copied.state.buffers["tied_too"]
    assert copied.state.params["tied"].data_ptr() != state.params["tied"].data_ptr()
    assert ts.diff(copied.state, state) == []


def test_the_memory_of_a_copy_is_used_again_until_the_writer_is_closed(tmp_path, make, monkeypatch):
    copies = []
    frozen_copy = Contents.frozen_copy

    def watched(self, buffers):
        copies.append(frozen_copy(self, buffers))
        return copies[-1]

    monkeypatch.setattr(Contents, "frozen_copy", watched)
    writer = BackgroundWriter()
    states = [make.state(seed=seed) for seed in (0, 1, 2)]
    for state in states[:2]:
        writer.submit(tmp_path, state.step, make.contents(state))
    first, second = (
        {t.data_ptr() for t in tree.leaves(c.state) if isinstance(t, torch.Tensor)} for c in copies
    )
    assert second == first
    writer.wait()
    assert ts.diff(load(tmp_path / "checkpoint-3").state, states[1]) == []
    # Memory that the next state has no use for is not kept.
    writer.submit(tmp_path, 4, make.contents(None, model_tensors={"w": torch.ones(2)}))
    writer.wait()
    assert len(writer._buffers._used) == 1
    assert not writer._buffers._free
    writer.close()
    assert not writer._buffers._used


def test_a_copy_without_state_or_tensors(tmp_path, make):
    contents = make.contents(None, model_tensors=None).frozen_copy()
    assert contents.state is None
    assert contents.model_tensors is None


EXITING = """
import sys, time, torch
from safetensors.torch import save_file
import trainstep as ts
import trainer.checkpoint.background as background
from trainer.checkpoint import Contents, save
from trainstep.state import TrainState

def slow(*arguments):
    time.sleep(0.5)
    return save(*arguments)

background.save = slow
w = torch.ones(100_000)
write = lambda folder, tensors: save_file(tensors, folder / "model.safetensors")
state = TrainState(3, {"w": w}, {}, {"m": w * 2}, ts.rng.key(0))
contents = Contents(write, state, {}, "{}", {}, model_tensors={"w": w})
background.BackgroundWriter().submit(sys.argv[1], 3, contents)
"""


def test_a_program_that_ends_without_waiting_still_finishes_the_save(tmp_path):
    command = [sys.executable, "-c", EXITING, str(tmp_path)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert verify(tmp_path / "checkpoint-3") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_on_a_gpu_gives_the_bytes_of_one_on_the_host(tmp_path, make):
    expected = files(save(tmp_path / "host", 3, make.contents(make.state())))
    on_gpu = tree.map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, make.state())
    assert files(save(tmp_path / "gpu", 3, make.contents(on_gpu))) == expected
    contents = make.contents(on_gpu)
    assert contents.frozen_copy().state.params["body.weight"].is_pinned()
    writer = BackgroundWriter()
    writer.submit(tmp_path / "async", 3, contents)
    for tensor in tree.leaves(on_gpu):
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    writer.wait()
    assert files(tmp_path / "async" / "checkpoint-3") == expected
    loaded = load(tmp_path / "async" / "checkpoint-3", device="cuda").state
    assert loaded.params["body.weight"].is_cuda
    assert ts.diff(loaded, make.state()) == []
