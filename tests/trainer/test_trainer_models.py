"""``Trainer`` with models and data of many forms, and with callbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.shell import (
    At,
    Killed,
    Recorder,
    Scored,
    kill,
    logged,
    make_trainer,
    samples,
    scored,
    weights,
)
from trainer import ProgressCallback, TrainerCallback

# ---- models and data of other forms


class Open(Scored):
    """Takes anything, and so divides its loss by the number of items itself."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        self.items = kwargs.get("num_items_in_batch")
        out = super().forward(x, labels)
        if labels is not None and self.items is not None:
            error = (out["logits"] - labels).square() * (labels != -100)
            out["loss"] = error.sum() / self.items
        return out


@pytest.mark.row(14)
def test_accumulation_by_items_equals_one_large_batch(tmp_path: Path) -> None:
    data = samples()
    for i, row in enumerate(data):
        row["labels"] = torch.where(torch.arange(2) < i % 2, -100.0, row["labels"])
    options: dict[str, Any] = {"train": data, "train_sampling_strategy": "sequential"}
    large, small = (
        make_trainer(
            tmp_path,
            scored("mlp", Open),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=10 // size,
            **options,
        )
        for size in (10, 2)
    )
    large.train()
    small.train()

    assert small.model.items == large.model.items == 15
    assert logged(small, "loss") == pytest.approx(logged(large, "loss"), rel=1e-5)
    assert logged(small, "grad_norm") == pytest.approx(logged(large, "grad_norm"), rel=1e-5)


class Tuples(Scored):
    """Returns ``(loss, logits)``."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return tuple(super().forward(x, labels).values())


def test_tuples_train_as_dicts_do(tmp_path: Path) -> None:
    dicts, tuples = (make_trainer(tmp_path, scored("mlp", kind)) for kind in (Scored, Tuples))
    dicts.train()
    tuples.train()

    assert logged(dicts, "loss") == logged(tuples, "loss")


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("frozen"), weight_decay=0.5)
    before = weights(trainer)
    trainer.train()

    assert trainer.get_num_trainable_parameters() == 12
    moved = [n for n, w in weights(trainer).items() if not torch.equal(w, before[n])]
    assert moved == ["body.2.weight"]


@pytest.mark.row(53)
def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    data = [{**row, "id": i, "text": "x"} for i, row in enumerate(samples())]
    trainer = make_trainer(tmp_path, train=data, evaluation=data)
    trainer.train()
    trainer.evaluate()

    with pytest.raises(TypeError, match="unexpected keyword argument 'id'"):
        make_trainer(tmp_path, train=data, remove_unused_columns=False).train()


def test_group_by_length_takes_the_longest_first(tmp_path: Path) -> None:
    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.widths = nn.Parameter(torch.ones(())), []

        def forward(self, input_ids: Tensor) -> Any:
            self.widths.append(input_ids.shape[1])
            return {"loss": self.scale * input_ids.float().mean()}

    model = Summing()
    data = [{"input_ids": torch.ones(n, dtype=torch.int64)} for n in (1, 7, 3, 2)]
    make_trainer(
        tmp_path,
        model,
        train=data,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=1,
    ).train()
    assert model.widths[0] == 7
    assert sorted(model.widths) == [1, 2, 3, 7]


@pytest.mark.row(43)
def test_bfloat16_trains_under_autocast(tmp_path: Path) -> None:
    class Kind(Scored):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            out = super().forward(x, labels)
            self.dtype = out["logits"].dtype
            return out

    trainer = make_trainer(tmp_path, scored("mlp", Kind), bf16=True)
    trainer.train()

    assert trainer.model.dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
    output = trainer.predict(samples(3))
    assert output.predictions.dtype == "float32"


# ---- callbacks


@pytest.mark.row(117)
def test_callbacks_are_added_found_and_removed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[Recorder])
    recorder = trainer.pop_callback(Recorder)

    assert recorder.events == ["init_end"]
    assert trainer.pop_callback(Recorder) is None
    trainer.add_callback(recorder)
    trainer.remove_callback(recorder)
    trainer.train()
    assert recorder.events == ["init_end"]


@pytest.mark.row(213)
@pytest.mark.parametrize(
    "event", ["train_begin", "step_begin", "pre_optimizer_step", "step_end", "evaluate", "log"]
)
def test_a_callback_that_raises_leaves_the_trainer_usable(event: str, tmp_path: Path) -> None:
    begin = event in ("train_begin", "step_begin", "pre_optimizer_step")
    trainer = make_trainer(
        tmp_path,
        scored("mlp"),
        callbacks=[At(event, 0 if begin else 1, kill)],
        disable_tqdm=False,
        eval_strategy="steps",
        eval_steps=1,
    )
    bars = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback))
    with pytest.raises(Killed):
        trainer.train()

    assert not trainer.is_in_train
    assert (bars.training_bar, bars.prediction_bar) == (None, None)
    assert trainer.train_state.step == (0 if begin else 1)
    assert trainer.train().global_step == 5
    assert "eval_loss" in trainer.evaluate()


class InTrain(TrainerCallback):
    """Notes whether the trainer says that it trains."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.add(self.trainer.is_in_train)


def test_the_trainer_knows_when_it_trains(tmp_path: Path) -> None:
    watch = InTrain()
    watch.trainer = make_trainer(tmp_path, callbacks=[watch])
    watch.trainer.train()

    assert watch.seen == {True}
    assert not watch.trainer.is_in_train
