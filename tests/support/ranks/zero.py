"""Trainings with DeepSpeed, and the same with data parallelism; each process reports what it found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trainstep as ts
from support.ranks.launch import report
from support.shell import logged, make_trainer, samples, scored, timeless
from trainer import Trainer
from trainer.checkpoint import CheckpointError
from trainer.distributed import agree
from trainer.distributed.deepspeed_model import gathered_model

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))

ADAM = {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto", "weight_decay": "auto"}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}}
GATHER = {"stage3_gather_16bit_weights_on_model_save": True}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed."""
    section = {"stage": stage, **GATHER, **more.pop("zero", {})}
    return {"zero_optimization": section, **more}


CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    **{f"stage {stage}": (zero(stage), {}) for stage in (1, 2, 3)},
    "their optimizer": (zero(2, optimizer=ADAM), {}),
    "their scheduler": (zero(2, scheduler=WARMUP), {}),
    "both theirs": (zero(3, optimizer=ADAM, scheduler=WARMUP), {}),
    "offload": (zero(2, zero={"offload_optimizer": {"device": "cpu"}}), {}),
    "plain bf16": (None, {"bf16": True}),
    "bf16 stage 2": (zero(2, bf16={"enabled": "auto"}), {"bf16": True}),
    "bf16 stage 3": (zero(3), {"bf16": True}),
}


def prepared(folder: Path, config: dict[str, Any] | None, **changes: Any) -> Any:
    """A trainer whose epochs end with fewer samples; 4 are a micro-batch on any number of processes."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4 // WORLD,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        **changes,
    }
    model = options.pop("model", None) or scored("dropout")
    return make_trainer(folder, model, train=samples(13), deepspeed=config, **options)


def weights(trainer: Any) -> list[float]:
    """All weights on process 0; every process must ask."""
    if trainer._zero is None:
        tensors: dict[str, Tensor] = trainer.train_state.params
    else:
        tensors = gathered_model(trainer)
    return [float(x) for tensor in tensors.values() for x in tensor.detach().flatten()]


def trained(folder: Path) -> dict[str, Any]:
    """Weights, losses, norms and rates of all cases."""
    found = {}
    for name, (config, changes) in CASES.items():
        trainer = prepared(folder, config, **changes)
        trainer.train()
        found[name] = {
            "weights": weights(trainer),
            "loss": logged(trainer, "loss"),
            "norm": logged(trainer, "grad_norm"),
            "rate": logged(trainer, "learning_rate"),
            "eval": trainer.evaluate()["eval_loss"],
            "dtype": str(next(trainer.model.parameters()).dtype),
            "held": [p.numel() for p in trainer.train_state.params.values()],
        }
    return found


def again(folder: Path) -> dict[str, Any]:
    """A second training goes on with the engine; a new model gets a new one; a foreign hook is called."""
    trainer = prepared(folder, zero(2))
    trainer.train()
    first = trainer.deepspeed
    trainer.train()
    found: dict[str, Any] = {
        "kept": trainer.deepspeed is first,
        "steps": first.global_steps,
        "loss": logged(trainer, "loss"),
    }
    schedule = prepared(folder, zero(2, scheduler=WARMUP))
    schedule.train()
    found["schedule"] = told(schedule.train)
    return found


class Broken(RuntimeError):
    """What a training is interrupted with."""


class Breaking(Trainer):
    """Fails once, in the fourth micro-batch: the second one of an update."""

    left = 4

    def training_step(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Broken
        return super().training_step(*args, **options)


def broken(folder: Path) -> dict[str, Any]:
    """A training that an error ends in the middle of an update; another goes on from its weights."""
    found: dict[str, Any] = {}
    for name, config in (
        ("2", zero(2)),
        ("3", zero(3)),
        ("theirs", zero(2, optimizer=ADAM)),
    ):
        trainer = prepared(folder / name, config, make=Breaking, warmup_steps=0)
        before = weights(trainer)
        try:
            trainer.train()
        except Broken:
            found[f"{name} engine"] = str(trainer.deepspeed)
        there = gathered_model(trainer)
        whole = agree.from_first(trainer._ranks, there)
        model = scored("dropout")
        model.load_state_dict(whole)
        found[f"{name} moved"] = before != weights(trainer)
        trainer.evaluate()
        trainer.train()
        fresh = prepared(folder / name, config, model=model, warmup_steps=0)
        fresh.train()
        found[name] = [logged(one, "loss") for one in (trainer, fresh)]
        found[f"{name} weights"] = [weights(one) for one in (trainer, fresh)]
    return found


def saves(folder: Path) -> dict[str, Any]:
    """Runs that save in the middle, and go on from there; what they come to."""
    found: dict[str, Any] = {}
    kinds = {
        "2": zero(2),
        "3": zero(3, zero={"stage3_gather_16bit_weights_on_model_save": False}),
        "bf16": zero(1, bf16={"enabled": True}),
        "theirs": zero(3, optimizer=ADAM, scheduler=WARMUP),
    }
    for name, config in kinds.items():
        options = {"save_strategy": "steps", "save_steps": 1, "bf16": name == "bf16"}
        whole = prepared(folder / name, config, **options)
        whole.train()
        rest = prepared(folder / "rest", config, bf16=name == "bf16")
        rest.train(resume_from_checkpoint=str(folder / name / "checkpoint-3"))
        assert rest.state.global_step == 4
        found[name] = [ts.digest(one.train_state) for one in (whole, rest)]
        found[name] += [logged(one, "loss") for one in (whole, rest)]
        found[f"{name} weights"] = weights(whole)
        whole.save_model(str(folder / name / "model"))
    found["newest"] = _newest(folder)
    found["best"] = _best(folder / "best")
    found["other stage"] = told(
        lambda: prepared(folder / "x", zero(3)).train(str(folder / "2" / "checkpoint-3"))
    )
    found["without"] = told(
        lambda: prepared(folder / "x", None).train(str(folder / "2" / "checkpoint-3"))
    )
    return found


def _newest(folder: Path) -> list[Any]:
    """Damage the engine's file of the last checkpoint: another is taken, or the reason told."""
    last = folder / "2" / "checkpoint-4"
    agree_ = prepared(folder / "2", zero(2))
    if RANK == 0:
        part = next(path for path in sorted(last.rglob("*optim_states.pt")))
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(bytes(data))
    agree.gather(agree_._ranks, None)
    named = told(lambda: agree_.train(str(last)))
    agree_.train(True)
    return [named, len(logged(agree_, "loss")), logged(agree_, "loss")[-1]]


def _best(folder: Path) -> list[float]:
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    worse = {"learning_rate": 5.0, "warmup_steps": 0, "optim": "sgd"}  # it diverges
    trainer = prepared(folder, zero(3), load_best_model_at_end=True, **worse, **steps)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    return [min(losses), losses[-1], trainer.evaluate()["eval_loss"]]


def disk(folder: Path) -> dict[str, Any]:
    """A save of which one process's file fails: all warn and go on, or raise if it was the last."""
    save = torch.save

    def full(value: Any, path: Any, **options: Any) -> None:
        if RANK == 1 and f".tmp-checkpoint-{bad}" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, **options)

    torch.save = full  # type: ignore[assignment]
    bad = 2
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = prepared(folder, zero(2), **options)
    trainer.train()
    agree.gather(trainer._ranks, None)
    left = sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)
    bad = 4
    last = told(prepared(folder / "last", zero(2), **options).train)
    torch.save = save
    return {"left": left, "last": last}


def parts(folder: Path) -> dict[str, Any]:
    """Models in parts from their creation; evaluation before any training."""
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.integrations import is_deepspeed_zero3_enabled

    from trainer import TrainingArguments

    found: dict[str, Any] = {}
    before = prepared(folder, zero(3))
    found["before"] = timeless([before.evaluate()])[0]["eval_loss"]
    found["expected"] = timeless([prepared(folder, None).evaluate()])[0]["eval_loss"]
    before.train()
    found["after"] = logged(before, "loss")

    made: list[bool] = []

    def init() -> Any:
        model = scored("dropout")
        made.append(all(hasattr(p, "ds_id") for p in model.parameters()))
        return model

    args = {"seed": 3, "num_train_epochs": 1}
    trainer = make_trainer(
        folder, more={"model_init": init}, make=_without_model, deepspeed=zero(3), **args
    )
    trainer.args.hf_deepspeed_config = None  # as without transformers
    trainer.train()
    found["made"] = made[-1]

    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    auto = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        "auto",
    )
    given = TrainingArguments(
        str(folder), deepspeed=zero(3, zero=auto), max_steps=2, logging_steps=1, **quiet
    )
    found["enabled"] = is_deepspeed_zero3_enabled()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=30, intermediate_size=16, max_position_embeddings=8, **sizes)
    if RANK == 0:
        given_folder = folder / "bert"
        torch.manual_seed(0)
        kept, given.hf_deepspeed_config = given.hf_deepspeed_config, None
        BertForSequenceClassification(config).save_pretrained(given_folder)
        given.hf_deepspeed_config = kept
    agree.gather(trainer._ranks, None)
    given.normalize()
    model = BertForSequenceClassification.from_pretrained(folder / "bert")
    found["bert"] = all(hasattr(p, "ds_id") for p in model.parameters())
    rows = torch.randint(0, 30, (8, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
    bert = Trainer(model, given, train_dataset=data)
    bert.train()
    found["losses"] = logged(bert, "loss")
    section = bert.deepspeed.config["zero_optimization"]
    found["buckets"] = [section[name] for name in auto]
    found["numbers"] = bert.get_num_trainable_parameters()
    return found


def _without_model(model: Any, args: Any, **more: Any) -> Any:
    return Trainer(None, args, **more)


def told(call: Any) -> str:
    """The text of the error that a call ends with."""
    try:
        call()
    except (ValueError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def launched(folder: Path) -> dict[str, Any]:
    """A training as a launcher starts it, without ``deepspeed`` among the arguments."""
    trainer = prepared(folder, None, use_cpu=False)
    trainer.train()
    accelerator = trainer.accelerator
    return {
        "stage": trainer.deepspeed.zero_optimization_stage(),
        "loss": logged(trainer, "loss"),
        "unwrapped": accelerator.unwrap_model(trainer.model_wrapped) is trainer.model,
    }


def alone(folder: Path) -> dict[str, Any]:
    """One process that nobody launched; and a checkpoint of two, which it cannot take up."""
    found: dict[str, Any] = {}
    for name, config in (("plain", None), ("zero", zero(2)), ("parts", zero(3))):
        trainer = prepared(folder / name, config, save_strategy="steps", save_steps=2)
        trainer.train()
        found[name] = logged(trainer, "loss")
    again = prepared(folder / "again", zero(2))
    again.train(str(folder / "zero" / "checkpoint-2"))
    found["again"] = logged(again, "loss")
    found["environment"] = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    if len(sys.argv) > 3:
        found["two"] = told(lambda: prepared(folder / "two", zero(2)).train(sys.argv[3]))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, what = sys.argv[1:3]
    known = (trained, again, broken, saves, disk, parts, launched, alone)
    table = {part.__name__: part for part in known}
    result = {one: table[one](Path(target) / one) for one in what.split(",")}
    report(Path(target), json.loads(json.dumps(result)))
