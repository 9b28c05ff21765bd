"""TrainerState: its file, its intervals, what it takes from a Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.callbacks import (
    TRAINER_STATE_NAME,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trainer.callbacks import state as state_module

FIELDS: dict[str, Any] = {
    "epoch": 1.5,
    "global_step": 3,
    "max_steps": 10,
    "logging_steps": 2,
    "eval_steps": 3,
    "save_steps": 4,
    "train_batch_size": 8,
    "num_train_epochs": 5,
    "num_input_tokens_seen": 77,
    "total_flos": 1e18,
    "log_history": [{"loss": 0.1, "step": 1}, {"eval_loss": float("inf"), "step": 2}],
    "best_metric": 0.25,
    "best_global_step": 2,
    "best_model_checkpoint": "out/checkpoint-2",
    "is_local_process_zero": True,
    "is_world_process_zero": False,
    "is_hyper_param_search": True,
    "trial_name": "first",
    "trial_params": {"lr": 0.1},
}


def test_name_of_the_file() -> None:
    assert TRAINER_STATE_NAME == "trainer_state.json"


def test_fields_and_defaults_are_those_of_transformers() -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    assert list(vars(TrainerState()).items()) == list(vars(peer.TrainerState()).items())


def test_file_is_that_of_transformers_and_both_read_both(tmp_path: Path) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    ours_path, theirs_path = tmp_path / "ours.json", tmp_path / "theirs.json"
    exported: Any = [EarlyStoppingCallback(2), TrainerControl(should_save=True)]
    ours = TrainerState(**FIELDS, stateful_callbacks=exported)
    theirs = peer.TrainerState(
        **FIELDS,
        stateful_callbacks=[peer.EarlyStoppingCallback(2), peer.TrainerControl(should_save=True)],
    )
    ours.save_to_json(ours_path)
    theirs.save_to_json(str(theirs_path))
    assert ours_path.read_bytes() == theirs_path.read_bytes()
    assert TrainerState.load_from_json(theirs_path) == ours
    assert peer.TrainerState.load_from_json(str(ours_path)) == theirs


def test_records_with_numpy_and_torch_values_are_saved(tmp_path: Path) -> None:
    state = TrainerState(
        log_history=[{"loss": torch.tensor(0.5), "f1": np.array([0.25, 0.5]), "step": np.int64(1)}],
        best_metric=np.float32(0.5),  # type: ignore[arg-type]
    )
    state.save_to_json(tmp_path / "state.json")
    loaded = TrainerState.load_from_json(tmp_path / "state.json")
    assert loaded.log_history == [{"loss": 0.5, "f1": [0.25, 0.5], "step": 1}]
    assert loaded.best_metric == 0.5


def test_nan_survives(tmp_path: Path) -> None:
    TrainerState(best_metric=math.nan).save_to_json(tmp_path / "state.json")
    best = TrainerState.load_from_json(tmp_path / "state.json").best_metric
    assert best is not None
    assert math.isnan(best)


def test_unknown_keys_are_dropped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"global_step": 3, "zeta": 1, "alpha": 2}))
    assert TrainerState.load_from_json(path) == TrainerState(global_step=3)
    assert f"{path} has keys that TrainerState does not know: alpha, zeta." in caplog.text


def test_a_subclass_keeps_its_own_fields(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclasses.dataclass
    class Mine(TrainerState):
        samples_seen: int = 0

    Mine(samples_seen=4).save_to_json(tmp_path / "state.json")
    assert Mine.load_from_json(tmp_path / "state.json") == Mine(samples_seen=4)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"epoch": 1', r"state\.json is not valid JSON .*cut off"), ("[]", "object, got list")],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainerState.load_from_json(tmp_path / "state.json")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    TrainerState(global_step=1).save_to_json(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(state_module.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        TrainerState(global_step=2).save_to_json(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_states_are_exported_at_construction() -> None:
    state = TrainerState(stateful_callbacks=[EarlyStoppingCallback(2)])  # type: ignore[arg-type]
    assert state.stateful_callbacks == {"EarlyStoppingCallback": EarlyStoppingCallback(2).state()}
    with pytest.raises(TypeError, match="state of TrainerCallback: only objects that inherit"):
        TrainerState(stateful_callbacks=[TrainerCallback()])  # type: ignore[arg-type]


@pytest.mark.row(99)
@pytest.mark.parametrize("steps", [None, 0.25, 0.07, 0.5, 1, 3, 500, 0])
@pytest.mark.parametrize("max_steps", [1, 10, 100])
def test_intervals_agree_with_transformers(steps: float | None, max_steps: int) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    args = SimpleNamespace(logging_steps=steps, eval_steps=steps, save_steps=steps)
    ours, theirs = TrainerState(), peer.TrainerState()
    ours.compute_steps(args, max_steps)
    theirs.compute_steps(args, max_steps)
    assert vars(ours) == vars(theirs)


def test_a_share_of_the_training_is_rounded_up() -> None:
    state = TrainerState()
    state.compute_steps(SimpleNamespace(logging_steps=5, eval_steps=0.25, save_steps=None), 10)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (5, 3, 500)


def make_trainer(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        is_local_process_zero=lambda: True, is_world_process_zero=lambda: False, **attributes
    )


def test_references_of_a_training_replace_those_of_a_checkpoint() -> None:
    state = TrainerState(max_steps=1, num_train_epochs=1, trial_params={"old": 1})
    trial = SimpleNamespace(params={"lr": 0.1}, number=7)
    trainer = make_trainer(hp_name=lambda trial: f"trial {trial.number}", _trial=trial)
    state.init_training_references(trainer, 20, 3, trial)
    assert (state.max_steps, state.num_train_epochs) == (20, 3)
    assert (state.is_local_process_zero, state.is_world_process_zero) == (True, False)
    assert (state.trial_name, state.trial_params) == ("trial 7", {"lr": 0.1})
    state.init_training_references(make_trainer(), 20, 3, None)
    assert state.trial_params is None


def test_trials_may_be_mappings_and_nothing_odd() -> None:
    state = TrainerState()
    state.init_training_references(make_trainer(), 1, 1, {"lr": 0.2})
    assert state.trial_params == {"lr": 0.2}
    with pytest.raises(TypeError, match=r"mapping of hyperparameters .* got int"):
        state.init_training_references(make_trainer(), 1, 1, 3)
