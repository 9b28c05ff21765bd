"""Loss functions and overridden hooks take effect, with the normalisation that they imply."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainstep as ts
from support.shell import make_trainer, scored
from trainer import Trainer


class Counting(nn.Module):
    """Classifies rows of 4 numbers; ``forward`` takes loss kwargs and divides by the items given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        items = kwargs.get("num_items_in_batch")
        kept = (labels != -100).sum() if items is None else items
        return {"loss": total / kept, "logits": logits}


def rows(n: int = 12) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=draws)
    labels[::5] = -100
    x = torch.randn(n, 4, generator=draws)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def train(folder: Path, micro: int, make: type[Trainer] = Trainer, **more: Any) -> Trainer:
    trainer = make_trainer(
        folder,
        Counting(),
        train=rows(),
        evaluation=rows(),
        make=make,
        more=more,
        per_device_train_batch_size=12 // micro,
        gradient_accumulation_steps=micro,
        num_train_epochs=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return trainer.train_state.params["head.weight"].clone()


def by_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum", ignore_index=-100)
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.row(14, 182)
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_token_counts_make_accumulation_equal_to_one_batch(micro: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "a", 1)
    parts = train(tmp_path / "b", micro)
    function = train(tmp_path / "c", micro, compute_loss_func=by_items)

    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(function), weights(whole), rtol=1e-5, atol=1e-6)
    assert function.evaluate()["eval_loss"] == pytest.approx(parts.evaluate()["eval_loss"])


@pytest.mark.row(12)
def test_a_loss_function_gets_the_labels_and_the_model_does_not(tmp_path: Path) -> None:
    seen: list[Any] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append((sorted(outputs), labels.shape, int(num_items_in_batch)))
        return by_items(outputs, labels, num_items_in_batch)

    train(tmp_path, 2, compute_loss_func=loss)
    assert seen[:2] == [(["logits"], (6,), 9), (["logits"], (6,), 9)]


class Documented(Trainer):
    """The example of the reference's documentation: no ``num_items_in_batch``."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(ignore_index=-100)(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.row(11)
def test_an_override_without_counts_returns_means(tmp_path: Path) -> None:
    trainer = train(tmp_path, 2, Documented)
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]

    batch = {k: torch.stack([row[k] for row in rows()]) for k in ("x", "labels")}
    logits = Counting()(batch["x"])["logits"]
    halves = [F.cross_entropy(logits[i], batch["labels"][i]) for i in (slice(6), slice(6, 12))]
    assert losses[0] == pytest.approx(sum(half.item() for half in halves) / 2)
    assert set(trainer.predict(rows()).metrics) >= {"test_loss"}


class Imperative(Trainer):
    """A training step written out by hand, as in scripts for PyTorch."""

    calls = 0

    def training_step(self, model: Any, inputs: Any) -> Tensor:  # type: ignore[override]
        type(self).calls += 1
        inputs = self._prepare_inputs(inputs)
        loss = model(**inputs)["loss"] / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


@pytest.mark.row(10)
def test_an_imperative_training_step_runs_as_written(tmp_path: Path) -> None:
    def run(folder: Path, make: type[Trainer]) -> Trainer:
        trainer = make_trainer(
            folder, scored(), make=make, gradient_accumulation_steps=2, num_train_epochs=2
        )
        trainer.train()
        return trainer

    Imperative.calls = 0
    mine, theirs = run(tmp_path / "a", Imperative), run(tmp_path / "b", Trainer)
    assert Imperative.calls == 10
    assert ts.digest(mine.train_state) == ts.digest(theirs.train_state)


@pytest.mark.row(37)
def test_created_optimizers_and_schedulers_can_be_overridden(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.25)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            return self.lr_scheduler

    trainer = make_trainer(tmp_path, make=Own, max_steps=4, max_grad_norm=0.0)
    trainer.train()
    rates = [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]
    assert rates == [0.25, 0.25, 0.125, 0.125]


@pytest.mark.row(35, 36)
def test_optimizers_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    model = scored()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    choice = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs, not both"):
        make_trainer(
            tmp_path, model, more={"optimizers": (sgd, None), "optimizer_cls_and_kwargs": choice}
        )
    with pytest.raises(RuntimeError, match="override create_optimizer_and_scheduler"):
        Trainer(model_init=scored, optimizers=(sgd, None))


@pytest.mark.row(36)
def test_a_class_with_options_is_used_with_the_decay_groups(tmp_path: Path) -> None:
    choice = (torch.optim.SGD, {"lr": 0.125, "momentum": 0.5})
    trainer = make_trainer(
        tmp_path, more={"optimizer_cls_and_kwargs": choice}, weight_decay=0.1, max_steps=2
    )
    trainer.train()
    assert type(trainer.optimizer) is torch.optim.SGD
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert trainer.train_state.opt_state["group0"].keys() == {"momentum_buffer"}


@pytest.mark.row(91)
def test_checkpoints_are_written_through_save_model(tmp_path: Path) -> None:
    class Noting(Trainer):
        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)
            (Path(str(output_dir)) / "note.txt").write_text("adapter")

    trainer = make_trainer(tmp_path, make=Noting, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "note.txt").read_text() == "adapter"
    again = make_trainer(tmp_path, make=Noting, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert ts.digest(again.train_state) == ts.digest(trainer.train_state)
