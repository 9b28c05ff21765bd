"""Trainings with ``fsdp``, and the same by one process; each process reports what it found."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainstep as ts
from support.ranks.launch import report
from support.ranks.same import Split, Words, words
from support.shell import Scored, logged, make_trainer, samples, scored, timeless
from trainer import Trainer
from trainer.checkpoint import CheckpointError, io
from trainer.distributed import agree
from trainer.distributed.fsdp import is_sharded
from trainstep import sharded

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
FULL = {"state_dict_type": "FULL_STATE_DICT"}


class Block(nn.Module):
    """A residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.inner(self.norm(x)).tanh()


class Stack(nn.Module):
    """Blocks between two layers that share a weight, and a frozen one; it says how to be wrapped."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.full((2,), 0.5))
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.frozen(x)) + self.tied(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.scale


class Wrapped(Scored):
    """Passes on which layers to wrap."""

    _no_split_modules = ("Block",)


def stacked() -> Scored:
    """A model of blocks."""
    return scored(Stack, Wrapped)


Case = tuple[Callable[[], nn.Module], Any, str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    # Name: model, data, fsdp, fsdp_config, other arguments.
    **{
        f"mean {n}": (lambda: scored("mlp"), samples(n), "full_shard", {"min_num_params": 20}, {})
        for n in (16, 13, 9, 3)
    },
    "layers": (stacked, samples(14), "full_shard auto_wrap", {}, {"weight_decay": 0.1}),
    "named layers": (
        stacked,
        samples(14),
        "shard_grad_op auto_wrap",
        {"fsdp_transformer_layer_cls_to_wrap": "Block", "fsdp_forward_prefetch": True},
        {},
    ),
    "whole": (stacked, samples(9), "full_shard", {"reshard_after_forward": False}, {}),
    "copies": (stacked, samples(13), "no_shard auto_wrap", {}, {}),
    "hybrid": (stacked, samples(13), "hybrid_shard auto_wrap", {}, {}),
    "hybrid 2": (stacked, samples(13), "hybrid_shard_zero2 auto_wrap", {}, {}),
    "sizes": (
        stacked,
        samples(13),
        "full_shard auto_wrap",
        {},
        {"parallelism_config": {"dp_replicate_size": WORLD // 2, "dp_shard_size": 2}}
        if WORLD > 1
        else {},
    ),
    "offload": (stacked, samples(9), "full_shard auto_wrap offload", {}, {}),
    "checkpointed": (
        stacked,
        samples(9),
        "full_shard auto_wrap",
        {"activation_checkpointing": True},
        {},
    ),
    "late": (
        lambda: scored("mlp"),
        samples(14),
        "full_shard",
        {},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}},
    ),
    "items": (Words, words(21), "full_shard", {}, {}),
    "skip": (lambda: scored("mlp"), samples(13), "full_shard", {}, {"on_nonfinite": "skip"}),
    "foreach": (lambda: scored("mlp"), samples(13), "full_shard", {}, {"optim": "adamw_torch"}),
    "foreign": (lambda: scored("mlp"), samples(13), "full_shard", {}, {"optim": "adagrad"}),
    "momentum": (lambda: scored("mlp"), samples(13), "full_shard", {}, {"optim": "sgd"}),
    "some parameters": (
        lambda: scored(Split),
        samples(13),
        "full_shard",
        {},
        {"ddp_find_unused_parameters": True, "weight_decay": 0.0, "optim": "sgd"},
    ),
}


def prepared(folder: Path, name: str, **changes: Any) -> Any:
    """A trainer of one of the cases; 4 samples are a global micro-batch on any number of processes.

    With ``copies=True`` every process has the whole model (DDP).
    """
    model, data, fsdp, config, more = CASES[name]
    module = model()
    if isinstance(module, Words):
        module.dropout.p = 0.0
    options = {
        "per_device_train_batch_size": 4 // WORLD,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 0.5,
        **more,
        **changes,
    }
    if WORLD > 1 and not options.pop("copies", False):
        options |= {"fsdp": fsdp, "fsdp_config": {**config, **options.pop("config", {})}}
    options.pop("config", None)
    if WORLD == 4:  # "hybrid": as if on two machines with two processes each
        os.environ["LOCAL_WORLD_SIZE"] = "2" if name.startswith("hybrid") else "4"
    return make_trainer(folder, module, train=data, **options)


def whole(trainer: Any) -> dict[str, Tensor]:
    """All weights of the state; every process must ask."""
    return {n: sharded.whole(p).clone() for n, p in trainer.train_state.params.items()}


def trained(folder: Path) -> dict[str, Any]:
    """Weights, losses and norms of all cases."""
    found = {}
    for name in CASES:
        trainer = prepared(folder, name)
        trainer.train()
        weights = whole(trainer)
        if WORLD > 1:
            assert is_sharded(trainer.model), name
            digests = agree.gather(trainer._ranks, ts.digest(trainer.train_state))
            assert len(set(digests)) == 1, name
            named = dict(trainer.model.named_parameters())
            for key, tensor in trainer.train_state.params.items():
                assert tensor.to_local().data_ptr() == named[key].to_local().data_ptr(), (name, key)
        found[name] = {
            "weights": list(itertools.chain(*(p.flatten().tolist() for p in weights.values()))),
            "loss": logged(trainer, "loss"),
            "norm": logged(trainer, "grad_norm"),
            "steps": trainer.state.global_step,
        }
    return found


def evaluated(folder: Path) -> dict[str, Any]:
    """Every sample once, in order, before any training."""
    found: dict[str, Any] = {}
    for n in (9, 8, 3, 1):
        trainer = prepared(folder, "layers", per_device_eval_batch_size=2)
        predicted = trainer.predict(samples(n, seed=4))
        found[f"predictions {n}"] = predicted.predictions.flatten().tolist()
        found[f"losses {n}"] = timeless([predicted.metrics, trainer.evaluate(samples(n, seed=4))])
    return found


def held(folder: Path) -> dict[str, Any]:
    """How much of the state this process holds, and how often blocks ran where they are checkpointed."""
    trainer = prepared(folder, "layers", gradient_accumulation_steps=1, num_train_epochs=1)
    trainer.train()
    leaves = [leaf for leaf in ts.tree.leaves(trainer.train_state) if isinstance(leaf, Tensor)]
    parts = sum(sharded.local(leaf).numel() for leaf in leaves)
    runs = {}
    for name in ("layers", "checkpointed"):
        one = prepared(folder, name, gradient_accumulation_steps=1, num_train_epochs=1)
        one.train()
        runs[name] = one.model.body.blocks[0].runs / one.state.global_step
    meshes = {}
    for name in ("hybrid", "sizes"):
        one = prepared(folder, name, max_steps=1)
        one.train()
        weight: Any = one.train_state.params["body.last.weight"]
        meshes[name] = list(weight.device_mesh.mesh.shape)
    # Only process 0 has loaded the weights.
    options = {"fsdp": "full_shard", "fsdp_config": {"cpu_ram_efficient_loading": True}}
    with torch.device("cpu" if RANK == 0 else "meta"):
        hollow = stacked()
    digests = []
    for model in (stacked(), hollow):
        one = make_trainer(folder, model, max_steps=2, **options)
        one.train()
        digests.append(ts.digest(one.train_state))
    return {
        "meshes": meshes,
        "digests": digests,
        "share": parts / sum(leaf.numel() for leaf in leaves),
        "runs": runs,
    }


class Noting(Trainer):
    """Adds a file to what it saves."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir) / "note.txt").write_text(" ".join(state_dict))


def saves(folder: Path) -> dict[str, Any]:
    """Runs that save in parts, at once and in threads, and as a whole; what they come to."""
    found: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {
        "parts": {},
        "threads": {"async_save": True},
        "whole": {"config": FULL},
        "whole threads": {"config": FULL, "async_save": True},
        "own": {"config": FULL, "async_save": True, "make": Noting},
    }
    for name, changes in kinds.items():
        trainer = long_run(folder / name, save_strategy="steps", save_steps=2, **changes)
        trainer.train()
        found[name] = ts.digest(trainer.train_state)
        trainer.save_model(str(folder / name / "model"))
    return found


def long_run(folder: Path, case: str = "layers", **changes: Any) -> Any:
    """A run of 8 updates whose fourth is in the middle of an epoch."""
    options = {"gradient_accumulation_steps": 1, "max_steps": 8, "on_nonfinite": "skip"}
    return prepared(folder, case, **{**options, **changes})


def killed(folder: Path) -> None:
    """A run of which process 1 gets SIGKILL while it writes its part of the second checkpoint."""
    write = io.write

    def write_or_die(file: Any, data: Any) -> None:
        write(file, data)
        if RANK == 1 and ".tmp-checkpoint-4" in file.name:
            os.kill(os.getpid(), signal.SIGKILL)

    io.write = write_or_die
    long_run(folder, save_strategy="steps", save_steps=2, ddp_timeout=20).train()


def resumed(folder: Path, *checkpoints: str) -> dict[str, str]:
    """Go on from checkpoints to the end."""
    found = {}
    for path in checkpoints:
        trainer = long_run(folder)
        trainer.train(resume_from_checkpoint=path)
        assert trainer.state.global_step == 8
        found[path] = ts.digest(trainer.train_state)
    return found


def there_and_back(folder: Path, checkpoint: str) -> dict[str, Any]:
    """Go on from a sharded checkpoint with whole models, save, and go on from there with parts."""
    copies = long_run(folder / "copies", copies=True, save_strategy="steps", save_steps=6)
    copies.train(resume_from_checkpoint=checkpoint)
    assert not is_sharded(copies.model)
    agree.gather(copies._ranks, None)
    parts = long_run(folder / "parts")
    parts.train(resume_from_checkpoint=str(folder / "copies" / "checkpoint-6"))
    assert is_sharded(parts.model)
    return {
        name: {key: tensor.tolist() for key, tensor in whole(trainer).items()}
        for name, trainer in (("copies", copies), ("parts", parts))
    }


def foreign(folder: Path) -> dict[str, Any]:
    """An optimizer that runs itself, saved in parts and resumed; and the best model loaded at the end."""
    trainer = long_run(folder / "own", "foreign", save_strategy="steps", save_steps=4)
    trainer.train()
    again = long_run(folder / "again", "foreign")
    again.train(resume_from_checkpoint=str(folder / "own" / "checkpoint-4"))
    found: dict[str, Any] = {
        "digests": [ts.digest(one.train_state) for one in (trainer, again)],
    }
    for name, config in (("parts", {}), ("whole", FULL)):
        best = long_run(
            folder / f"best {name}",
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            learning_rate=3.0,  # it gets worse
            load_best_model_at_end=True,
            save_total_limit=2,
            config=config,
        )
        best.train()
        losses = logged(best, "eval_loss")
        found[f"best {name}"] = [min(losses), losses[-1], best.evaluate()["eval_loss"]]
    return found


def refusals(folder: Path) -> dict[str, Any]:
    """What a trainer says, and a save of which one process's part fails."""
    found: dict[str, Any] = {}
    wrong: dict[str, dict[str, Any]] = {
        "exact": {"exact_reduction": True},
        "layers": {"config": {"transformer_layer_cls_to_wrap": ["Nothing"]}},
    }
    for name, changes in wrong.items():
        try:
            prepared(folder / name, "layers", **changes).train()
        except ValueError as error:
            found[name] = str(error)
    try:
        model = stacked()
        made = torch.optim.SGD(model.parameters())
        make_trainer(folder, model, more={"optimizers": (made, None)}, fsdp="full_shard")
    except RuntimeError as error:
        found["optimizers"] = str(error)
    found["disk"] = _failing_disk(folder / "disk")
    return found


def _failing_disk(folder: Path) -> Any:
    write = io.write

    def full(file: Any, data: Any) -> None:
        if RANK == 1 and ".tmp-checkpoint-4" in file.name:
            raise OSError(28, "No space left on device")
        write(file, data)

    io.write = full
    trainer = long_run(folder, save_strategy="steps", save_steps=2)
    try:
        trainer.train()
    finally:
        io.write = write
    agree.gather(trainer._ranks, None)
    left = sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)
    io.write = lambda file, data: (
        full(file, data) if ".tmp" in file.name and RANK else write(file, data)
    )
    told = ""
    try:
        long_run(folder / "last", max_steps=4, save_strategy="steps", save_steps=4).train()
    except CheckpointError as error:
        told = str(error)
    io.write = write
    return [left, told]


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, what, *rest = sys.argv[1:]
    parts: dict[str, Any] = {
        "trained": trained,
        "evaluated": evaluated,
        "held": held,
        "saves": saves,
        "foreign": foreign,
        "killed": killed,
        "refusals": refusals,
    }
    result = {}
    for one in what.split(","):
        if one == "resumed":
            result[one] = resumed(Path(target), *rest)
            result["there and back"] = there_and_back(Path(target) / "there", rest[0])
        else:
            result[one] = parts[one](Path(target) / one)
    report(Path(target), json.loads(json.dumps(result)))
