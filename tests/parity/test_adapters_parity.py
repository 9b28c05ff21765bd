"""Models of peft: adapters train, are saved, loaded and resumed as with the Hugging Face Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support.peer import both, texts, tiny
from support.shell import At, Killed, kill, logged, make_trainer

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "label_smoothing_factor": 0.1,
}


def adapted() -> nn.Module:
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(tiny("gpt2"), options)


def own(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
def test_adapters_train_to_the_same_bits_and_the_best_are_loaded(tmp_path: Path) -> None:
    data = {"train": texts(16), "evaluation": texts(6, seed=1)}
    ours, other = both(tmp_path, adapted(), **data, **SETTINGS)

    assert ours.history == other.history
    mine, given = own(ours.trainer), own(other.trainer)
    assert mine.keys() == given.keys()
    assert all(torch.equal(mine[name], given[name]) for name in mine)
    assert ours.trainer.state.best_global_step == other.trainer.state.best_global_step
    files = {path.name for path in (tmp_path / "ours" / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_adapters_goes_on(tmp_path: Path) -> None:
    data: dict[str, Any] = {"train": texts(16), "evaluation": texts(6, seed=1)}
    settings = SETTINGS | {"load_best_model_at_end": False}
    whole = make_trainer(tmp_path / "whole", adapted(), **data, **settings)
    whole.train()
    cut = make_trainer(
        tmp_path / "cut", adapted(), callbacks=[At("step_end", 3, kill)], **data, **settings
    )
    with pytest.raises(Killed):
        cut.train()
    again = make_trainer(tmp_path / "cut", adapted(), **data, **settings)
    again.train(resume_from_checkpoint=True)
    assert ts.digest(again.train_state) == ts.digest(whole.train_state)
    assert logged(again, "loss") == logged(whole, "loss")
