"""Trainings and evaluations whose results must not depend on the number of processes.

Each function is run by one process after the other and by several at once, with the same global batch, and
returns what must be equal.
"""

import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainstep as ts
from support.full import FULL
from support.ranks.launch import report
from support.shell import Scored, Stream, logged, make_trainer, samples, scored, timeless
from trainer.distributed import agree

GLOBAL_BATCH = 8
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Words(nn.Module):
    """A tiny language model that divides its loss by ``num_items_in_batch`` itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(11, 8)
            self.dropout = nn.Dropout(0.2)
            self.head = nn.Linear(8, 11)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.embedding(input_ids)).tanh())
        if labels is None:
            return {"logits": logits}
        how = "mean" if num_items_in_batch is None else "sum"
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=how)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return {"loss": loss, "logits": logits}


class Split(nn.Module):
    """Samples with a negative first number reach one of its layers, the others the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [(self.left if row[0] < 0 else self.right)(row) for row in x]
        return torch.stack(parts)


def words(n: int) -> list[dict[str, Tensor]]:
    """Make ``n`` rows of 6 tokens, of which up to 4 are no labels."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        ids = torch.randint(0, 11, (6,), generator=generator)
        labels = ids.clone()
        labels[: i % 5] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def settings(rows: int, **changes: Any) -> dict[str, Any]:
    """Options for micro-batches of ``rows`` samples, and the global batch."""
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": GLOBAL_BATCH // rows // WORLD,
        "num_train_epochs": 2,
        **changes,
    }


def checked(trainer: Any) -> Any:
    """Assert that all processes have the same state, which the module shares; return the trainer."""
    digests = agree.gather(trainer._ranks, ts.digest(trainer.train_state))
    assert len(set(digests)) == 1, digests
    named = dict(trainer.model.named_parameters())
    for name, tensor in trainer.train_state.params.items():
        assert tensor.data_ptr() == named[name].data_ptr(), name
    return trainer


def drawn(seed: int) -> list[dict[str, Any]]:
    """Draw settings of runs; ``window`` is the micro-batches of an update on all processes."""
    draw = random.Random(seed)
    return [
        {
            "rows": draw.randint(1, 3),
            "window": draw.choice([4, 8]),
            "accumulation": draw.randint(1, 4),
            "drop_last": draw.random() < 0.5,
            "n": draw.randint(4, 40),
        }
        for _ in range(40 if FULL else 5)
    ]


def exactly(folder: Path) -> dict[str, Any]:
    """Exact reduction with dropout, clipping, accumulation, and epochs that end in the middle."""
    found = {}
    cases: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
        **{
            f"mean {n}": (lambda: scored("dropout"), samples(n), {}) for n in (16, 15, 13, 11, 9, 3)
        },
        "items": (Words, words(21), {}),
        "smoothed": (Words, words(13), {"label_smoothing_factor": 0.1}),
        "odd rows": (lambda: scored("dropout"), samples(19), {"max_grad_norm": 0.1}),
        "some parameters": (lambda: scored(Split), samples(11), {"on_nonfinite": "skip"}),
    }
    for one in drawn(0):
        changes = {
            "per_device_train_batch_size": one["rows"],
            "gradient_accumulation_steps": one["window"] // WORLD,
        }
        cases[f"drawn {one}"] = (lambda: scored("dropout"), samples(one["n"]), changes)
    for name, (model, data, changes) in cases.items():
        options = settings(1 if name == "odd rows" else 2, exact_reduction=True, **changes)
        trainer = make_trainer(folder / name, model(), train=data, **options)
        result = trainer.train()
        history = timeless(trainer.state.log_history)
        for record in history:
            del record["epoch"]  # counted in batches of a process, the last of which may be short
        found[name] = [ts.digest(checked(trainer).train_state), history, result.training_loss]
    return found


def jointly(folder: Path) -> dict[str, Any]:
    """The batches of all processes are one: weights, losses and norms, to the rounding of sums."""
    found = {}
    rows = 4 // WORLD  # side by side always 4, which is what one process has
    cases: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
        **{f"mean {n}": (lambda: scored("mlp"), samples(n), {}) for n in (16, 15, 14, 13, 9)},
        "items": (Words, words(21), {}),
        "smoothed": (Words, words(22), {"label_smoothing_factor": 0.1}),
        "some parameters": (lambda: scored(Split), samples(13), {"on_nonfinite": "skip"}),
        "synchronised": (
            lambda: scored("mlp"),
            samples(16),
            {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        ),
        "shared batches": (lambda: scored("mlp"), samples(14), {"rows": 4}),
        "by length": (Words, words(24), {"train_sampling_strategy": "group_by_length"}),
        "stream": (lambda: scored("mlp"), Stream(samples(13)), {"max_steps": 4}),
    }
    for one in drawn(1):
        changes = {
            "gradient_accumulation_steps": one["accumulation"],
            "dataloader_drop_last": one["drop_last"],
        }
        cases[f"drawn {one}"] = (lambda: scored("mlp"), samples(one["n"]), changes)
    for name, (model, data, changes) in cases.items():
        taken = changes.pop("rows", rows)
        always = {"include_num_input_tokens_seen": "all", "gradient_accumulation_steps": 2}
        options = settings(taken, **{**always, **changes})
        if taken != rows:
            options["accelerator_config"] = {"split_batches": True}
        module = model()
        if isinstance(module, Words):
            module.dropout.p = 0.0
        trainer = make_trainer(folder / name, module, train=data, **options)
        trainer.train()
        weights = [p.flatten().tolist() for p in checked(trainer).train_state.params.values()]
        found[name] = {
            "weights": list(itertools.chain(*weights)),
            "loss": logged(trainer, "loss"),
            "norm": logged(trainer, "grad_norm"),
            "steps": trainer.state.global_step,
            "epochs": logged(trainer, "epoch"),
            "tokens": trainer.state.num_input_tokens_seen,
            "seen": logged(trainer, "num_input_tokens_seen"),
            "total": trainer.get_total_train_batch_size(trainer.args),
        }
    return found


class Half(Scored):
    """Its outputs are as wide as the batch's first label says, and it returns texts besides."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found: dict[str, Any] = super().forward(x, labels)
        found["wide"] = found["logits"].repeat(1, 1 + int(x[0, 0] > 0))
        return found


class Texts(Scored):
    """It returns a text for each sample."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found: dict[str, Any] = super().forward(x, labels)
        return {"loss": found["loss"], "texts": [f"{value:.4f}" for value in x[:, 0].tolist()]}


def evaluated(folder: Path) -> dict[str, Any]:
    """Every sample once, in order, with batches of 2 on each process."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any], dict[str, float]]:
        def metrics(given: Any) -> dict[str, float]:
            arrays = [given.label_ids, given.inputs, given.losses]
            found[name] = [np.asarray(array).tolist() for array in arrays if array is not None]
            return {"seen": float(len(given.label_ids))}

        return metrics

    small = {"per_device_eval_batch_size": 2}
    for n in (9, 8, 3, 1):
        data = samples(n, seed=4)
        wanted = {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 2}
        trainer = make_trainer(
            folder,
            scored("mlp", Half),
            more={"compute_metrics": keep(f"metrics {n}")},
            **small,
            **wanted,
        )
        trainer.model.main_input_name = "x"
        predicted = trainer.predict(data)
        found[f"predictions {n}"] = [part.tolist() for part in predicted.predictions]
        found[f"losses {n}"] = timeless([predicted.metrics, trainer.evaluate(data)])
    trainer = make_trainer(folder, scored("mlp", Texts), eval_use_gather_object=True, **small)
    found["texts"] = trainer.predict(samples(7)).predictions
    trainer = make_trainer(folder, scored("mlp"), **small)
    stream = trainer.predict(Stream(samples(9)))
    found["stream"] = [stream.predictions.tolist(), timeless([stream.metrics])]
    found["batches"] = batch_metrics(folder, small)
    return found


def batch_metrics(folder: Path, small: dict[str, Any]) -> Any:
    """Metrics that are told batch by batch."""
    told: list[Any] = []

    def metrics(given: Any, compute_result: bool) -> dict[str, float]:
        told.append([given.label_ids.tolist(), compute_result])
        return {"batches": float(len(told))}

    options = {"batch_eval_metrics": True, **small}
    trainer = make_trainer(folder, scored("mlp"), more={"compute_metrics": metrics}, **options)
    return [timeless([trainer.evaluate(samples(9))]), told]


def save(folder: Path, name: str, *, exact: bool = True) -> str:
    """Train, saving in the middle of an epoch; returns the digest at the end."""
    trainer = long_run(folder / name, exact)
    trainer.train()
    return ts.digest(trainer.train_state)


def resume(checkpoint: Path, folder: Path, *, exact: bool = True) -> str:
    """Go on from a checkpoint to the end; returns the digest there."""
    trainer = long_run(folder, exact, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 9
    return ts.digest(checked(trainer).train_state)


def long_run(folder: Path, exact: bool, **changes: Any) -> Any:
    """A trainer of 9 updates, 3 to an epoch of 21 samples, that saves after 2, 4, 6, 8 and 9."""
    options = settings(2, num_train_epochs=3, exact_reduction=exact, save_strategy="steps")
    return make_trainer(
        folder, scored("dropout"), train=samples(21), **{**options, "save_steps": 2, **changes}
    )


def everything(folder: Path, resumed: list[Path]) -> dict[str, Any]:
    """Run all of this; resume the runs of other numbers of processes that are given."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "exactly": exactly(folder / "exactly"),
        "jointly": jointly(folder / "jointly"),
        "evaluated": evaluated(folder / "evaluated"),
        "saved": save(folder, "saved"),
    }
    found["resumed"] = resumptions(folder, resumed)
    return found


def resumptions(folder: Path, resumed: list[Path]) -> dict[str, str]:
    """Resume runs in the middle of an epoch and at an epoch's last update."""
    return {
        f"{run.parent.name} {step}": resume(run / f"checkpoint-{step}", folder / "resumed")
        for run in resumed
        for step in (4, 6)
    }


if __name__ == "__main__":
    target, only, *others = sys.argv[1:]
    runs = [Path(other) for other in others]
    if only == "resume":
        report(Path(target), resumptions(Path(target), runs))
    else:
        report(Path(target), json.loads(json.dumps(everything(Path(target), runs))))
