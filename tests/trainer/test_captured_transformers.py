"""Models of transformers in CUDA graphs: the same bits, and what their masks need."""

from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from trainer import Trainer, TrainingArguments

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=64, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    if kind == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**sizes, vocab_size=128, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "classifier":  # its first pass writes into its config, and so it is compiled twice
        config = transformers.BertConfig(**small, num_labels=128)
        return transformers.BertForSequenceClassification(config)
    return transformers.BertForMaskedLM(transformers.BertConfig(**small))


def data(masked: bool) -> list[dict[str, torch.Tensor]]:
    """Make samples; with ``masked`` about half of the batches of 4 hide some tokens."""
    tokens = torch.randint(1, 128, (32, 16), generator=torch.Generator().manual_seed(0))
    samples = []
    for number, ids in enumerate(tokens):
        sample = {"input_ids": ids, "labels": ids.clone()}
        if masked:
            mask = torch.ones(16, dtype=torch.int64)
            mask[16 - 5 * (number % 8 == 0) :] = 0
            sample |= {"attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}
        samples.append(sample)
    return samples


def train(folder: Path, kind: str, masked: bool = False, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=12,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    samples = data(masked)
    if kind == "classifier":
        samples = [{**sample, "labels": sample["input_ids"][0]} for sample in samples]
    trainer = Trainer(model(kind), arguments, train_dataset=samples)
    trainer.train()
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    return ts.diff(a.train_state, b.train_state) == []


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_recorded_as_they_are(kind: str, masked: bool, tmp_path: Path) -> None:
    mine = train(tmp_path / "a", kind, masked, bf16=True)
    assert mine.lowering == "eager, recorded in CUDA graphs"
    assert same(mine, train(tmp_path / "b", kind, masked, bf16=True, capture="off"))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "classifier"])
def test_recorded_and_compiled(kind: str, tmp_path: Path) -> None:
    # Compiled kernels add up gradients of embeddings in any order unless told otherwise.
    options = {"torch_compile": True, "full_determinism": True}
    torch._dynamo.reset()
    mine = train(tmp_path / "a", kind, masked=True, **options)
    assert mine.lowering == "compiled, recorded in CUDA graphs"
    assert same(mine, train(tmp_path / "b", kind, masked=True, capture="off", **options))


def test_layers_that_run_again_with_dropout_are_not_recorded(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    mine = train(tmp_path / "a", "gpt2", **options)
    assert "without CUDA graphs" in str(mine.lowering)
    assert same(mine, train(tmp_path / "b", "gpt2", capture="off", **options))


def test_full_determinism_gives_one_digest(tmp_path: Path) -> None:
    digests = {
        ts.digest(train(tmp_path / str(n), "gpt2", bf16=True, **options).train_state)
        for n, options in enumerate(
            [
                {"full_determinism": True},
                {"full_determinism": True},
                {"full_determinism": True, "capture": "off"},
            ]
        )
    }
    assert len(digests) == 1
