"""Every optimizer that is installed continues from a checkpoint as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support import libraries
from support.shell import logged, make_args, make_trainer, outcome, scored, weights
from trainer.arguments import OptimizerNames
from trainer.optimizers import check_optimizer

NAMES = [name.value for name in OptimizerNames]
UNORDERED = ("stable_adamw",)  # its kernel on the device adds up in whatever order comes
ON_CUDA = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise")
SETTINGS = {
    "galore": {
        "optim_target_modules": ["body.1", "body.3"],
        "optim_args": "rank=2,update_proj_gap=2",
    },
    "apollo": {"optim_target_modules": "all-linear", "optim_args": "rank=2,update_proj_gap=2"},
    "schedule_free": {"lr_scheduler_type": "constant", "warmup_steps": 2},
    "ademamix": {"optim_args": "t_alpha=4,t_beta3=4"},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


class Wide(nn.Module):
    """A layer and an embedding large enough for quantized moments, and small parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 64)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table((x * 8).long().clamp(-64, 63) + 64).mean(1))


def build(folder: Path, name: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"optim": name, "weight_decay": 0.0, "learning_rate": 0.01}
    settings |= next((more for part, more in SETTINGS.items() if part in name), {})
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes}
    return make_trainer(folder, scored(Wide), **settings)


def need(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Skip if an optimizer is not installed, or cannot run here."""
    if name in ON_CUDA and not torch.cuda.is_available():
        pytest.skip(f"{name} runs on CUDA devices only")
    if (
        name == "adalomo" and not torch.cuda.is_available()
    ):  # puts its moments there, and could do without
        monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    targets = {"optim_target_modules": "all-linear", **changes}
    try:
        check_optimizer(make_args(tmp_path, optim=name, **targets))
    except ImportError as error:
        pytest.skip(str(error))


def assert_resumes(tmp_path: Path, name: str, **changes: Any) -> Any:
    """Assert that 6 updates are 3, a checkpoint and 3, to the last bit, in all that is kept."""
    whole = build(tmp_path, name, **changes)
    before = weights(whole)
    result = whole.train()
    assert all(not torch.equal(before[key], value) for key, value in weights(whole).items())
    assert all(norm > 0 for norm in logged(whole, "grad_norm"))

    resumed = build(tmp_path, name, **changes)
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert ts.diff(resumed.train_state, whole.train_state) == []
    assert outcome(resumed, again) == outcome(whole, result)
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name, tmp_path, monkeypatch)
    assert_resumes(tmp_path, name)


STANDING_IN = ("galore_adamw", "galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo")


@pytest.mark.parametrize("name", STANDING_IN)
def test_resuming_a_stand_in_is_exact(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    assert_resumes(tmp_path, name)


@pytest.mark.parametrize("name", ["adagrad", "adafactor", "schedule_free_adamw", "grokadamw"])
def test_evaluating_and_saving_in_a_thread_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(name, tmp_path, monkeypatch)
    plain = assert_resumes(tmp_path / "plain", name)
    watched = assert_resumes(
        tmp_path / "watched", name, async_save=True, eval_strategy="steps", eval_steps=1
    )
    assert ts.equal(watched.train_state, plain.train_state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNORDERED])
def test_resuming_is_exact_on_cuda(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(name, tmp_path, monkeypatch)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    whole = assert_resumes(tmp_path, name, use_cpu=False)
    assert {p.device.type for p in whole.model.parameters()} == {"cuda"}
