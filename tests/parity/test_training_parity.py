"""Training gives the Hugging Face Trainer's bits: batches, losses, norms, rates, weights, events."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.peer import assert_same_weights, both, texts, theirs, tiny
from support.shell import (
    At,
    Normed,
    Scored,
    Stream,
    Watching,
    make_trainer,
    samples,
    scored,
    stop,
    weights,
)

pytest.importorskip("transformers")

FULL: dict[str, Any] = {"num_train_epochs": 3, "weight_decay": 0.1, "warmup_steps": 3}


@pytest.mark.row(2, 16, 48)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
        {"optim": "sgd"},
        {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.3},
        {"lr_scheduler_type": "constant", "seed": 7, "data_seed": 3},
        {"max_steps": 7, "dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential", "num_train_epochs": 1.4},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_plain_module_trains_to_the_same_bits(
    changes: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    """23 samples in batches of 2: the last batch and the last window are not full."""
    settings = {**FULL, "max_grad_norm": 0.5, **changes}
    ours, other = both(
        tmp_path,
        scored(Normed, Watching),
        train=samples(23),
        gradient_accumulation_steps=accumulation,
        **settings,
    )

    assert ours.history == other.history
    assert [list(r) for r in ours.history] == [list(r) for r in other.history]
    assert len(ours.history) > 3
    assert ours.trainer.model.seen == other.trainer.model.seen
    assert ours.events == other.events
    assert ours.result.training_loss == other.result.training_loss
    assert_same_weights(ours, other)


@pytest.mark.row(14)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_trains_to_the_same_bits(
    name: str, accumulation: int, tmp_path: Path
) -> None:
    """Labels are ignored in different numbers, so tokens and batches weigh differently."""
    ours, other = both(
        tmp_path,
        tiny(name),
        train=texts(15, ignored=5),
        evaluation=texts(7, seed=3, ignored=2),
        gradient_accumulation_steps=accumulation,
        eval_strategy="epoch",
        **{**FULL, "num_train_epochs": 2, "learning_rate": 0.01},
    )

    histories = ours.history, other.history
    for history in histories:
        history[-1].pop("total_flos")  # an estimate that this version does not make
    assert histories[0] == histories[1]
    assert ours.events == other.events
    assert_same_weights(ours, other)


@pytest.mark.parametrize("name", ["batch_norm", "tied", "gru", "frozen", "weight_norm"])
def test_modules_of_other_kinds_train_to_the_same_bits(name: str, tmp_path: Path) -> None:
    ours, other = both(tmp_path, scored(name), num_train_epochs=2, gradient_accumulation_steps=2)

    assert ours.history == other.history
    assert_same_weights(ours, other)


class Counted(Scored):
    """Divides its loss by the number of items, as models with ``**kwargs`` are expected to."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(x, labels)
        if labels is not None:
            kept = labels != -100
            error = ((out["logits"] - labels).square() * kept).sum()
            out["loss"] = error / kwargs.get("num_items_in_batch", kept.sum())
        return out


def test_a_loss_divided_by_items_trains_to_the_same_bits(tmp_path: Path) -> None:
    data = samples(23)
    for i, row in enumerate(data):
        row["labels"] = torch.where(torch.arange(2) < i % 2, -100.0, row["labels"])
    ours, other = both(tmp_path, scored("mlp", Counted), train=data, gradient_accumulation_steps=4)

    assert ours.history == other.history
    assert_same_weights(ours, other)


@pytest.mark.row(99)
def test_means_of_several_updates_are_the_same(tmp_path: Path) -> None:
    ours, other = both(
        tmp_path, scored(Normed), train=samples(23), logging_steps=5, logging_first_step=True
    )

    assert [r["step"] for r in ours.history] == [1, 5, 10, 12]
    assert ours.history == other.history


@pytest.mark.row(100)
@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_shows_alike(filtered: bool, tmp_path: Path) -> None:
    data = samples()
    data[3]["labels"] = torch.full((2,), float("nan"))
    ours, other = both(
        tmp_path, scored("mlp"), train=data, logging_steps=5, logging_nan_inf_filter=filtered
    )

    assert str(ours.history) == str(other.history)
    assert ("'loss': nan" in str(ours.history)) is not filtered


@pytest.mark.row(115)
@pytest.mark.parametrize(
    "changes",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 0.3, "eval_delay": 2, "eval_on_start": True},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
        | {"metric_for_best_model": "loss", "load_best_model_at_end": True},
        {"num_train_epochs": 2.3, "logging_first_step": True, "logging_steps": 3},
        {"max_steps": 0},
        {"save_strategy": "steps", "save_steps": 0, "logging_strategy": "no"},
    ],
    ids=str,
)
def test_events_come_in_the_same_order(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, other = both(
        tmp_path, scored("mlp"), gradient_accumulation_steps=2, **{"num_train_epochs": 2} | changes
    )

    assert ours.events == other.events
    assert [list(r) for r in ours.history] == [list(r) for r in other.history]
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "theirs").iterdir()
    )
    for key in ("global_step", "epoch", "max_steps", "best_metric", "best_global_step"):
        assert getattr(ours.trainer.state, key) == getattr(other.trainer.state, key), key
    if changes != {"max_steps": 0}:
        assert ours.history == other.history


def test_stops_take_effect_at_the_same_place(tmp_path: Path) -> None:
    def epoch_stop(control: Any) -> None:
        control.should_epoch_stop = True

    def act(trainer: Any) -> Any:
        trainer.add_callback(At("step_end", 2, epoch_stop))
        trainer.add_callback(At("step_end", 6, stop))
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp", Watching), act, num_train_epochs=3)

    assert ours.events == other.events
    assert ours.history == other.history
    assert ours.trainer.model.seen == other.trainer.model.seen


def test_a_stream_is_seen_alike_where_windows_fit(tmp_path: Path) -> None:
    model, sides = scored("mlp", Watching), []
    for folder, build in (("ours", make_trainer), ("theirs", theirs)):
        trainer = build(
            tmp_path / folder,
            copy.deepcopy(model),
            train=Stream(samples(8)),
            max_steps=5,
            gradient_accumulation_steps=2,
            accelerator_config={"dispatch_batches": False},
        )
        trainer.train()
        sides.append(trainer)

    assert sides[0].model.seen == sides[1].model.seen
    assert [r["epoch"] for r in sides[0].state.log_history] == [
        r["epoch"] for r in sides[1].state.log_history
    ]
    for name, tensor in weights(sides[0]).items():
        assert torch.equal(tensor, weights(sides[1])[name]), name


def test_a_second_training_continues_alike(tmp_path: Path) -> None:
    def twice(trainer: Any) -> Any:
        trainer.train()
        return trainer.train()

    ours, other = both(tmp_path, scored("mlp"), twice)

    assert ours.history == other.history
    assert ours.events == other.events
    assert_same_weights(ours, other)
