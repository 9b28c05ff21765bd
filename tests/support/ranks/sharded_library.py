"""Models of transformers under ``fsdp``: wrapped as they say, saved for ``from_pretrained``, generating."""

import sys
from pathlib import Path
from typing import Any

import torch

from support import generation
from support.ranks.launch import report
from support.shell import logged, make_args, make_trainer, samples, scored
from trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trainer.distributed.fsdp import is_sharded
from trainer.distributed.fsdp_plan import wanted

SHARDED = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}


def gpt() -> Any:
    """Make a tiny decoder with tied embeddings."""
    import transformers

    small: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 23}
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        n_positions=16, bos_token_id=0, eos_token_id=1, **small, **dropouts
    )
    return generation.seeded(transformers.GPT2LMHeadModel, config, 0)


def texts(n: int) -> list[dict[str, torch.Tensor]]:
    """Make ``n`` rows of 8 tokens."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, 23, (8,), generator=generator) for _ in range(n)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def language_model(folder: Path, **changes: Any) -> Any:
    """Train a decoder for two epochs of five updates."""
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "learning_rate": 1e-2, **changes}
    trainer = make_trainer(folder, gpt(), train=texts(20), **options)
    trainer.train()
    return trainer


def generated(folder: Path, model: Any, n: int, **changes: Any) -> Any:
    """Predict by generating."""
    arguments = make_args(folder).to_dict()
    chosen = ("output_dir", "use_cpu", "disable_tqdm", "report_to", "save_strategy")
    args = Seq2SeqTrainingArguments(
        **{name: arguments[name] for name in chosen},
        predict_with_generate=True,
        generation_max_length=12,
        per_device_eval_batch_size=2,
        **changes,
    )
    trainer = Seq2SeqTrainer(model, args, data_collator=generation.padded)
    return trainer.predict(generation.pairs(n)).predictions.tolist()


def everything(folder: Path) -> dict[str, Any]:
    """What the test compares."""
    trainer = language_model(folder / "plain", **SHARDED)
    assert is_sharded(trainer.model)
    blocks = [is_sharded(block) for block in trainer.model.transformer.h]
    trainer.save_model(str(folder / "model"))
    found: dict[str, Any] = {"loss": logged(trainer, "loss"), "blocks": blocks}
    for half in ("bf16", "fp16"):
        one = language_model(folder / half, **SHARDED, **{half: True})
        found[half] = logged(one, "loss")
        dtypes = {str(p.dtype) for p in one.train_state.params.values()}
        assert dtypes == {"torch.float32"}, dtypes
    found["generated"] = {
        name: generated(folder, make(), 5, **SHARDED) for name, make in generation.MODELS.items()
    }
    return found


def by_environment(folder: Path) -> dict[str, Any]:
    """A trainer without ``fsdp``, started with accelerate's variables."""
    trainer = make_trainer(folder, scored("mlp"), train=samples(8), save_strategy="epoch")
    trainer.train()
    names = sorted(path.name for path in (folder / "checkpoint-2").glob("*.safetensors"))
    return {"wanted": wanted(trainer.args), "sharded": is_sharded(trainer.model), "files": names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    report(target, {"all": everything, "environment": by_environment}[sys.argv[2]](target))
