"""Tiny models of transformers that generate, whose sequences end at different lengths; their data."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 23


def t5(**changes: Any) -> nn.Module:
    """Make an encoder-decoder with pad 0, end 1 and relative positions."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24}
    small |= {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    small |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.T5Config(initializer_factor=8.0, **(small | changes))
    return seeded(transformers.T5ForConditionalGeneration, config, 3)


def bart(**changes: Any) -> nn.Module:
    """Make an encoder-decoder with pad 1, end 2, whose decoder begins with the end token."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "init_std": 0.5}
    small |= {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    small |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    small |= {"max_position_embeddings": 40, "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0}
    small |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    config = transformers.BartConfig(**(small | changes))
    return seeded(transformers.BartForConditionalGeneration, config, 3)


MODELS = {"t5": t5, "bart": bart}


def seeded(make: Any, config: Any, seed: int) -> nn.Module:
    """Make a model without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(config)


def pairs(n: int, length: int = 6, labels: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make ``n`` samples: ``input_ids`` (length,) and ``labels`` (labels,), no special tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (size,), generator=generator)

    return [{"input_ids": ids(length), "labels": ids(labels)} for _ in range(n)]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate samples of different lengths: labels with -100, inputs with a masked 3."""
    fill = {"input_ids": 3, "labels": -100, "decoder_input_ids": 3}
    given = {key: [row[key] for row in rows] for key in rows[0]}
    batch = {
        key: nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill[key])
        for key, values in given.items()
    }
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    steps = torch.arange(batch["input_ids"].shape[1])
    return {**batch, "attention_mask": (steps < sizes[:, None]).long()}
