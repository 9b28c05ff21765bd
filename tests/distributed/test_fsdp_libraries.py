"""Sharded training of transformers' models, and accelerate's configuration of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from support import generation
from support.ranks.launch import launch
from support.ranks.sharded_library import generated, language_model
from support.shell import logged
from trainer.checkpoint import consolidate

VARIABLES = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "20",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@pytest.mark.row(155, 157)
def test_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ranks = launch(2, "sharded_library", tmp_path, "all").found
    # One process with twice the rows a batch: the same batches.
    alone = language_model(tmp_path / "alone", per_device_train_batch_size=4)
    expected = {name: generated(tmp_path, make(), 5) for name, make in generation.MODELS.items()}
    for found in ranks:
        assert found["blocks"] == [True, True]
        assert_allclose(found["loss"], logged(alone, "loss"), rtol=2e-6)
        for half, bound in (("bf16", 2e-2), ("fp16", 1e-2)):
            assert_allclose(found[half], logged(alone, "loss"), rtol=bound)
        assert found["generated"] == expected

    consolidate(tmp_path / "plain" / "checkpoint-10")
    models: list[Any] = [
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder)
        for folder in ("model", "plain/checkpoint-10")
    ]
    assert models[0].config.architectures == models[1].config.architectures == ["GPT2LMHeadModel"]
    weights = [model.state_dict() for model in models]
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        assert_allclose(weights[0][name], tensor.detach(), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.row(176)
def test_variables_of_accelerate_shard_a_trainer_without_the_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    for found in launch(2, "sharded_library", tmp_path, "environment").found:
        assert found == {
            "wanted": True,
            "sharded": True,
            "files": ["state-0.safetensors", "state-1.safetensors"],
        }
