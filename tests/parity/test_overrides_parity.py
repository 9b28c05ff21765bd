"""Overridden hooks are called with what the Hugging Face Trainer gives them, and as often."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from support.peer import Side, assert_same_weights, both
from support.shell import samples, scored
from trainer import TrainerCallback

pytest.importorskip("transformers")


class OwnLoaders:
    """Makes loaders of the dataset that it is given."""

    asked: list[Any]

    def get_eval_dataloader(self, eval_dataset: Any) -> Any:
        self.__dict__.setdefault("asked", []).append(eval_dataset)
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[attr-defined]
        return DataLoader(eval_dataset, batch_size=5)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self.__dict__.setdefault("asked", []).append(test_dataset)
        return DataLoader(test_dataset, batch_size=5)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        raise AssertionError("only the loaders above ask for a sampler")


ONE, OTHER = samples(5, seed=1), samples(3, seed=2)


@pytest.mark.row(49)
@pytest.mark.parametrize(
    "act",
    [
        lambda trainer: trainer.train() and None,
        lambda trainer: trainer.evaluate() and None,
        lambda trainer: trainer.evaluate(OTHER) and None,
        lambda trainer: trainer.evaluate({"c": OTHER}) and None,
        lambda trainer: trainer.predict(OTHER) and None,
    ],
    ids=["train", "evaluate", "evaluate-other", "evaluate-dict", "predict"],
)
@pytest.mark.parametrize("evaluation", [ONE, {"a": ONE, "b": OTHER}], ids=["one", "dict"])
def test_loaders_are_asked_for_with_the_dataset(
    act: Callable[[Any], Any], evaluation: Any, tmp_path: Path
) -> None:
    ours, other = both(
        tmp_path,
        scored("mlp"),
        act,
        overrides=OwnLoaders,
        evaluation=evaluation,
        eval_strategy="epoch",
    )
    assert ours.trainer.asked
    assert len(ours.trainer.asked) == len(other.trainer.asked)
    for mine, given in zip(ours.trainer.asked, other.trainer.asked, strict=True):
        assert mine is given


class Reading:
    """Looks at the first batch of every update."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        window, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        first = float(window[0]["x"][0, 0])
        self.__dict__.setdefault("seen", []).append((first, len(window)))
        return window, items


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_batches_are_taken_only_while_there_are_some(accumulation: int, tmp_path: Path) -> None:
    ours, other = both(
        tmp_path,
        scored("mlp"),
        overrides=Reading,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
    )
    assert ours.trainer.seen == other.trainer.seen
    assert len(ours.trainer.seen) == ours.result.global_step
    assert_same_weights(ours, other)


class Hoarding:
    """Reads several batches ahead, and hands them out without reading in the calls that follow."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        kept = self.__dict__.setdefault("kept", [])
        if not kept:
            kept += islice(epoch_iterator, 3)
        window = [kept.pop(0) for _ in range(min(num_batches, len(kept)))]
        return window, None


@pytest.mark.parametrize("epochs", [1, 2])
def test_batches_that_were_read_ahead_are_trained_on(epochs: int, tmp_path: Path) -> None:
    ours, other = both(
        tmp_path, scored("mlp"), overrides=Hoarding, num_train_epochs=epochs, max_grad_norm=0
    )
    assert ours.result.global_step == other.result.global_step
    assert_same_weights(ours, other)


class LeavingOut:
    """Leaves out the batches of some calls: no backward pass, as guards against bad batches do."""

    skipped: tuple[int, ...] = ()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        calls = self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        if calls in self.skipped:
            return torch.tensor(0.0)
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc,no-any-return]


class Second(LeavingOut):
    skipped = (2, 4, 7)


class Both(LeavingOut):
    skipped = (3, 4, 6)


@pytest.mark.row(10)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad"])
@pytest.mark.parametrize(("overrides", "accumulation"), [(Second, 1), (Both, 2)])
def test_batches_can_be_left_out(
    overrides: type,
    accumulation: int,
    optim: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, other = both(
        tmp_path,
        scored("mlp"),
        overrides=overrides,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        optim=optim,
        max_grad_norm=0.5,
        weight_decay=0.1,
    )
    assert ours.history == other.history
    assert ours.events == other.events
    assert ours.result.global_step == other.result.global_step
    assert_same_weights(ours, other)
    assert 0.0 in [record.get("grad_norm") for record in ours.history]
    assert caplog.text.count("training_step left out the batch") == 1


@pytest.mark.row(10)
def test_a_run_that_goes_on_may_begin_with_a_batch_that_is_left_out(tmp_path: Path) -> None:
    class First(LeavingOut):
        skipped = (1,)

    def act(trainer: Any) -> Any:
        type(trainer).skipped = ()
        trainer.train()
        type(trainer).skipped = (1,)
        trainer.calls = 0
        trainer.args.num_train_epochs = 2
        return trainer.train(resume_from_checkpoint=True)

    ours, other = both(
        tmp_path,
        scored("mlp"),
        act,
        overrides=First,
        save_strategy="epoch",
        lr_scheduler_type="constant",
    )
    assert ours.history[-6:-1] == other.history[-6:-1]
    assert ours.result.global_step == 10
    assert_same_weights(ours, other)


class Loosening(TrainerCallback):
    """Clips to another norm from update to update."""

    def __init__(self, norms: list[float]) -> None:
        self.norms = norms

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.max_grad_norm = self.norms[state.global_step % len(self.norms)]


def clipped(tmp_path: Path, **settings: Any) -> tuple[Side, Side]:
    return both(
        tmp_path,
        scored("mlp"),
        callbacks=[Loosening([1e-3, 0.0, 0.1])],
        num_train_epochs=2,
        optim="sgd",
        max_grad_norm=0.01,
        **settings,
    )


@pytest.mark.row(16)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_clipping_follows_the_arguments(accumulation: int, tmp_path: Path) -> None:
    ours, other = clipped(tmp_path, gradient_accumulation_steps=accumulation)
    assert ours.history == other.history
    assert_same_weights(ours, other)


def test_the_test_above_sees_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.clipping.Clipping.__call__", lambda self: None)
    ours, other = clipped(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(ours, other)
