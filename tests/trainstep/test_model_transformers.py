"""``functionalize`` on real architectures: tied heads, rotary buffers, recomputation, records as output."""

from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support.snapshots import untouched

transformers = pytest.importorskip("transformers")

VOCAB = 31
SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "Llama": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
    },
    "Bert": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
}
HEADS = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM"}


def build(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **SIZES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, HEADS[name])(config)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def loss(call: Any, data: dict[str, torch.Tensor]) -> torch.Tensor:
    value: torch.Tensor = call(**data)["loss"]
    return value


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_the_models_own_with_dropout_and_checkpointing(name: str) -> None:
    model, plain, data, key = build(name), build(name), batch(), ts.rng.key(3)
    _, params, buffers = ts.functionalize(model)
    grad_fn = ts.value_and_grad(ts.module_loss(model, loss))
    with untouched(model, params, buffers, data):
        value, grads = grad_fn(params, buffers, data, key)
    with ts.rng.seeded(key.fold_in(0)):
        expected = loss(plain, data)
        expected.backward()
    assert torch.equal(value.value, expected.detach())
    own = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert grads.keys() == own.keys()
    assert all(torch.equal(grads[n], own[n]) for n in grads)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with untouched(model):
        assert ts.equal(grad_fn(params, buffers, data, key)[1], grads)


def test_training_from_ids_to_state_leaves_the_model_as_it_was() -> None:
    model = build("GPT2")
    step = ts.donate(
        ts.make_step(ts.module_loss(model, loss), ts.optim.adamw(lr=1e-2), microbatches=3)
    )
    state = ts.init(model, step.optimizer)
    assert "lm_head.weight" not in state.params, "tied to the embedding"
    with untouched(model):
        losses = []
        for _ in range(8):
            state, metrics = step(state, batch())
            losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0]
