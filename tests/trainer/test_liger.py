"""Liger kernels: who is patched, when, and what is said where that cannot be."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import libraries
from support.peer import texts, tiny
from support.shell import logged, make_trainer, scored
from trainer import liger

Calls = list[tuple[Any, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put a stand-in for the library in place, which notes what it is asked to patch."""
    seen: Calls = []
    libraries.put(
        monkeypatch,
        "liger_kernel.transformers",
        _apply_liger_kernel_to_instance=lambda model, **config: seen.append((model, config)),
    )
    say_version(monkeypatch, "0.8.5")
    return seen


def say_version(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let the library have a version, or none; others have their own."""
    ask = importlib.metadata.version

    def answer(name: str) -> str:
        if name != "liger-kernel":
            return ask(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)


def build(folder: Path, model: Any, **changes: Any) -> Any:
    settings = {"use_liger_kernel": True, "max_steps": 1, **changes}
    return make_trainer(folder, model, train=texts(4), evaluation=texts(2), **settings)


@pytest.mark.row(22)
def test_the_model_is_patched_when_training_starts(calls: Calls, tmp_path: Path) -> None:
    config = {"rope": False, "swiglu": True}
    trainer = build(tmp_path, tiny("llama"), liger_kernel_config=config)
    assert calls == []
    trainer.train()
    assert calls == [(trainer.model, config)]
    trainer.train()
    assert len(calls) == 2  # a model may be another by then


def test_the_library_chooses_without_a_configuration(calls: Calls, tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny("gpt2"))
    trainer.train()
    assert calls == [(trainer.model, {})]


def test_wrappers_are_looked_through(calls: Calls) -> None:
    inner = tiny("gpt2")

    class Adapted(nn.Module):
        def get_base_model(self) -> nn.Module:
            return inner

    liger.apply(nn.DataParallel(Adapted()), None)
    assert calls == [(inner, {})]


def test_another_model_is_left_alone_with_a_warning(
    calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, scored("mlp"), use_liger_kernel=True, max_steps=1).train()
    assert calls == []
    assert "use_liger_kernel: Scored is not a PreTrainedModel of transformers" in caplog.text


def test_nothing_is_imported_or_patched_unless_asked(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.lack(monkeypatch, "liger_kernel")
    build(tmp_path, tiny("gpt2"), use_liger_kernel=False).train()
    assert calls == []


@pytest.mark.row(22)
def test_a_missing_library_is_named_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.lack(monkeypatch, "liger_kernel")
    with pytest.raises(ImportError, match=r"needs the package liger-kernel.*'trainstep\[liger\]'"):
        make_trainer(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize(
    ("version", "good"), [("0.2.9", False), ("0.3.0", True), ("1.0.dev", True)]
)
def test_an_old_library_is_refused(
    version: str, good: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_version(monkeypatch, version)
    if good:
        liger.check_installed()
    else:
        with pytest.raises(ImportError, match=r"version 0\.2\.9 is installed, 0\.3\.0 or newer"):
            liger.check_installed()


def test_a_source_tree_without_a_version_will_do(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_version(monkeypatch, None)
    liger.check_installed()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_patched_and_plain_models_learn_the_same(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel.transformers")
    losses = []
    for use in (False, True):
        model = tiny("llama", hidden_size=64, intermediate_size=128)
        settings = {"use_cpu": False, "max_steps": 4, "use_liger_kernel": use}
        trainer = build(tmp_path / str(use), model, **settings)
        trainer.train()
        kinds = {type(module).__module__.partition(".")[0] for module in trainer.model.modules()}
        forwards = {getattr(m.forward, "__module__", "") for m in trainer.model.modules()}
        patched = any(name.startswith("liger") for name in kinds | forwards)
        assert patched == use
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
