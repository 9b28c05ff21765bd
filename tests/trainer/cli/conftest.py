"""The script of docs/cli.md, runs of it, and a way to call ``trainstep``."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import Contents, save
from trainer.cli import main
from trainstep.rng import key
from trainstep.state import TrainState

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()


def script_text() -> str:
    """Return train.py as the page has it."""
    match = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert match
    return match[1]


def train(script: Path, *arguments: str) -> None:
    """Run a training script in this process, as ``python script.py`` would."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.py, an exact run ``a``, and ``b`` with noise after step 5."""
    folder = tmp_path_factory.mktemp("cli")
    script = folder / "train.py"
    script.write_text(script_text())
    train(script, "--out", str(folder / "a"))
    train(script, "--out", str(folder / "b"), "--noise", "5")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``trained`` to damage, which is the working directory."""
    folder = tmp_path / "runs"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


@frozen
class Outcome:
    """What a call of ``trainstep`` returned and printed."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The JSON that was printed."""
        return json.loads(self.out)


@pytest.fixture
def trainstep(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call ``trainstep`` with the arguments given."""

    def call(*argv: Any) -> Outcome:
        capsys.readouterr()
        status = main([str(one) for one in argv])
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return call


@pytest.fixture
def refused(trainstep: Callable[..., Outcome]) -> Callable[..., str]:
    """Call ``trainstep``, check that it fails on one line with status 2, and return the line."""

    def call(*argv: Any) -> str:
        outcome = trainstep(*argv)
        assert outcome.status == 2
        assert outcome.out == ""
        assert outcome.err.startswith("trainstep: ")
        assert outcome.err.count("\n") == 1
        return outcome.err

    return call


def flip(path: Path, at: int = -1) -> None:
    """Flip one bit of a file, in its last byte unless told otherwise."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def flip_bit() -> Callable[..., None]:
    return flip


@pytest.fixture
def run_training() -> Callable[..., None]:
    return train


def write(root: Path, params: dict[str, Tensor], step: int = 3, **changes: Any) -> Path:
    """Save a checkpoint of a state with these parameters and little else."""
    state = TrainState(step, params, {}, {"count": 1, "rate": 0.5}, key(0))
    fields: dict[str, Any] = {
        "write_model": lambda folder: save_file({"w": torch.ones(2)}, folder / "model.safetensors"),
        "state": state,
        "position": {"epoch": 0, "batch": step},
        "trainer_state": '{"global_step": 3}',
        "arguments": {"learning_rate": 0.1, "output_dir": str(root)},
    }
    return save(root, step, Contents(**(fields | changes)))


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    return write
