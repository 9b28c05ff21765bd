"""States of every kind of leaf, contents around them, and a disk that can be made to fail."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.disk import Disk, Killed
from trainer.checkpoint import Contents
from trainstep.rng import key
from trainstep.state import TrainState


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def every_dtype(seed: int) -> dict[str, Tensor]:
    """Return one tensor of every dtype that a state may hold, filled with random bits."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
        *(torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    )
    tensors = {}
    for dtype in dtypes:
        bits = torch.randint(0, 256, (3, 5 * dtype.itemsize), generator=generator).to(torch.uint8)
        tensors[str(dtype).removeprefix("torch.")] = bits.view(dtype)
    tensors["bool"] = torch.tensor([[True, False, True]])
    return tensors


def make_state(step: int = 3, seed: int = 0) -> TrainState:
    """Return a state with every dtype, scalars, empties, odd layouts and shared memory."""
    torch.manual_seed(seed)
    weight, shared = torch.randn(4, 6), torch.randn(5)
    params = {
        "body.weight": weight,
        "transposed": torch.randn(6, 4).T,
        "strided": torch.randn(8)[::2],
        "tied": shared,
        "scale": torch.tensor(float(seed)),
    }
    buffers = {"tied_too": shared, "count": torch.tensor(7 + seed), "none": torch.zeros(0, 3)}
    odd = {"nan": torch.tensor([float("nan"), -0.0, float("inf")]), "conj": torch.randn(2, 2) * 1j}
    odd["conj"] = odd["conj"].conj()
    odd["empty_complex"] = torch.zeros(0, 2, dtype=torch.complex128)
    odd["expanded"] = torch.randn(1, 3).expand(4, 3)
    opt_state = {"m": {name: torch.randn_like(p) for name, p in params.items()}, "dtypes": {}}
    opt_state["dtypes"] = every_dtype(seed)
    extras = {
        "odd": odd,
        "list": [torch.ones(2), (1, None, "text", 0.1, float("-inf"))],
        "on": True,
    }
    return TrainState(step, params, buffers, opt_state, key(seed), extras)


def write_model(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a model as transformers would: safetensors, a configuration, a folder beside."""
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (folder / "processor").mkdir()
    (folder / "processor" / "vocab.txt").write_text("a\nb\n")


def make_contents(state: TrainState | None, **changes: Any) -> Contents:
    """Return the contents of a checkpoint of ``state``; all but two weights are in the model file."""
    weights = {}
    if state is not None and "model_tensors" not in changes:
        names = [name for name in state.params if name not in ("strided", "tied")]
        weights = {name: state.params[name] for name in names}
        weights["count"] = state.buffers["count"]
    fields: dict[str, Any] = {
        "write_model": write_model,
        "model_tensors": weights or {"w": torch.ones(2)},
        "state": state,
        "position": {"epoch": 1, "index": 2**40, "fraction": 0.1, "nested": [1, None]},
        "trainer_state": '{"global_step": 3, "größe": "ü"}',
        "arguments": {"learning_rate": 1e-4, "output_dir": "out"},
        "host_rng": {0: {"python": [3, [1, 2], None]}, 1: {"python": [3, [3, 4], None]}},
        "world_size": 2,
    }
    return Contents(**(fields | changes))


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders above."""
    return SimpleNamespace(state=make_state, contents=make_contents, write_model=write_model)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that fails on demand; harmless until armed. Nothing is really synced: power stays on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Disk(monkeypatch)


@pytest.fixture
def killed() -> type[BaseException]:
    """What a simulated kill raises."""
    return Killed
