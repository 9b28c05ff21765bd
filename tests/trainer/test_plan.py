"""How long a training is."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from trainer.plan import length_of, make_plan, num_examples


class Sized:
    """A loader of ``batches`` batches over a dataset of ``samples`` samples."""

    def __init__(self, batches: int, samples: int) -> None:
        self.batches, self.dataset = batches, range(samples)

    def __len__(self) -> int:
        return self.batches


def arguments(**changes: Any) -> SimpleNamespace:
    given = {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "per_device_train_batch_size": 2,
        "dataloader_drop_last": False,
    }
    return SimpleNamespace(**given | changes)


@pytest.mark.row(2, 3)
@pytest.mark.parametrize(
    ("epochs", "begun", "steps", "seen"),
    [(0.5, 1, 2, 5.0), (1.0, 1, 3, 10.0), (1.5, 2, 5, 15.0), (2.3, 3, 7, 23.0), (3, 3, 9, 30)],
)
def test_epochs_become_updates(epochs: float, begun: int, steps: int, seen: float) -> None:
    plan = make_plan(arguments(num_train_epochs=epochs), Sized(5, 10), 4)

    assert (plan.num_train_epochs, plan.max_steps) == (begun, steps)
    assert (plan.updates_per_epoch, plan.batches_per_epoch) == (3, 5)
    assert (plan.num_examples, plan.total_batch_size) == (10, 4)
    assert plan.num_train_samples == pytest.approx(seen)


@pytest.mark.row(4)
@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (3, 1), (4, 2), (9, 3), (10, 4)])
def test_max_steps_win_over_epochs_and_repeat_the_data(steps: int, epochs: int) -> None:
    plan = make_plan(arguments(max_steps=steps), Sized(5, 10), 4)

    assert (plan.num_train_epochs, plan.max_steps) == (epochs, steps)
    assert plan.num_train_samples == 4 * steps


def test_zero_steps_begin_an_epoch_because_one_update_is_made() -> None:
    plan = make_plan(arguments(max_steps=0), Sized(5, 10), 4)

    assert (plan.num_train_epochs, plan.max_steps, plan.num_train_samples) == (1, 0, 0)


def test_data_without_length_go_on_until_max_steps() -> None:
    plan = make_plan(arguments(max_steps=6), iter(()), 4)

    assert plan.num_train_epochs == sys.maxsize
    assert plan.batches_per_epoch is None
    assert (plan.max_steps, plan.updates_per_epoch) == (6, 6)
    assert plan.num_examples == plan.num_train_samples == 24
    assert plan.epoch_fraction(3, 2) == 3 / 12


def test_the_fraction_of_an_epoch_counts_micro_batches() -> None:
    plan = make_plan(arguments(), Sized(5, 10), 4)

    assert [plan.epoch_fraction(n, 2) for n in (0, 2, 5)] == [0.0, 0.4, 1.0]


def test_data_without_length_need_max_steps() -> None:
    with pytest.raises(
        ValueError, match=r"no length.*set max_steps, which is -1, to the number of"
    ):
        make_plan(arguments(), iter(()), 4)


def test_a_loader_without_a_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"no batch: the dataset has 3 samples, a batch takes 4, and .*is True"
    ):
        make_plan(
            arguments(per_device_train_batch_size=4, dataloader_drop_last=True), Sized(0, 3), 4
        )


def test_examples_are_estimated_where_the_dataset_has_no_length() -> None:
    loader = Sized(5, 10)
    assert num_examples(loader, 2) == 10
    loader.dataset = iter(())  # type: ignore[assignment]
    assert num_examples(loader, 2) == 10
    loader.batches = 4
    assert num_examples(loader, 2) == 8
    assert num_examples(iter(()), 2) == 0


def test_lengths() -> None:
    assert length_of([1, 2]) == 2
    assert length_of(iter([1, 2])) is None
    assert length_of(DataLoader([1, 2, 3], batch_size=2)) == 2
