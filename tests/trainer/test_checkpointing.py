"""Gradient checkpointing: switched on with the options given, at the same loss and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.peer import texts, tiny
from support.shell import make_trainer, weights
from trainer import checkpointing

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
REENTRANT = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def options_of(model: nn.Module) -> dict[str, Any]:
    """What the model's blocks hand on to ``torch.utils.checkpoint.checkpoint``."""
    found = [
        part._gradient_checkpointing_func.keywords
        for part in model.modules()
        if hasattr(part, "_gradient_checkpointing_func")
    ]
    assert all(keywords == found[0] for keywords in found)
    return found[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    rows = texts(3)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    torch.manual_seed(0)
    loss = model.train()(**batch)["loss"]
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.row(19)
@pytest.mark.parametrize("kwargs", REENTRANT, ids=["default", "not_reentrant", "reentrant"])
def test_the_same_loss_and_gradients(kwargs: Any) -> None:
    expected = gradients(tiny("gpt2", use_cache=False, **DROPOUT))
    model: Any = tiny("gpt2", use_cache=False, **DROPOUT)
    calls: list[int] = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    checkpointing.enable(nn.DataParallel(model), kwargs)
    found = gradients(model)

    assert model.is_gradient_checkpointing
    assert options_of(model) == {"use_reentrant": False, **(kwargs or {})}
    assert len(calls) == 2  # forward, and again in the backward pass
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kwargs", REENTRANT[1:], ids=["not_reentrant", "reentrant"])
def test_a_training_ends_with_the_same_bits(kwargs: Any, tmp_path: Path) -> None:
    trained = []
    for name, options in (("plain", None), ("checkpointed", kwargs)):
        model = tiny("gpt2", use_cache=False, **DROPOUT)
        if options:
            checkpointing.enable(model, options)
        trainer = make_trainer(
            tmp_path / name, model, train=texts(8), gradient_accumulation_steps=2, evaluation=[]
        )
        trainer.train()
        trained.append(weights(trainer))
    plain, other = trained
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_enabling_again_adds_nothing_unless_the_options_change() -> None:
    model: Any = tiny("llama")
    checkpointing.enable(model, {})
    hooks = len(model.get_input_embeddings()._forward_hooks)
    checkpointing.enable(model, {"use_reentrant": False})
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    checkpointing.enable(model, {"use_reentrant": True})
    assert options_of(model) == {"use_reentrant": True}
    model.gradient_checkpointing_disable()
    checkpointing.enable(model, {"use_reentrant": True})
    assert model.is_gradient_checkpointing


class Own(nn.Module):
    """A module of one's own that offers it."""

    given: Any = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        self.given = gradient_checkpointing_kwargs


def test_other_modules() -> None:
    model = Own()
    checkpointing.enable(model, {"preserve_rng_state": False})
    assert model.given == {"use_reentrant": False, "preserve_rng_state": False}
    with pytest.raises(
        ValueError, match=r"Linear has no method gradient_checkpointing_enable.*=False"
    ):
        checkpointing.enable(nn.Linear(1, 1), None)
