"""Running sums of what is logged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from support.shell import make_trainer, samples
from trainer.meter import Meter

RATE = torch.tensor(0.1, dtype=torch.float64)


def add(meter: Meter, loss: float, norm: float = 1.0) -> None:
    meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm), "lr": RATE})


def test_means_are_over_the_updates_since_the_last_read() -> None:
    meter = Meter(True)
    assert not meter.pending
    for loss in [1.0, 2.0, 6.0]:
        add(meter, loss)

    assert meter.pending
    assert meter.read(3) == 3.0
    assert not meter.pending
    add(meter, 5.0)
    assert meter.read(4) == 5.0


def test_the_mean_of_the_run_has_what_was_read_and_what_was_not() -> None:
    meter = Meter(True)
    assert meter.mean(0) == 0.0
    for loss in [1.0, 2.0]:
        add(meter, loss)
    meter.read(2)
    add(meter, 6.0)

    assert meter.mean(3) == 3.0
    assert meter.pending  # asking changes nothing


@pytest.mark.row(100)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_replaced_by_the_mean_so_far(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Meter(True)
    for loss in [1.0, 3.0, bad, 4.0]:
        add(meter, loss)

    # As the Hugging Face Trainer: the sum so far over (1 + updates so far), here 4 / 3.
    assert meter.read(4) == pytest.approx((1 + 3 + 4 / 3 + 4) / 4, rel=1e-6)
    assert "1 of the last 4 updates (to step 4) had a loss or gradient that is not finite" in (
        caplog.text
    )


def test_the_first_loss_may_be_bad() -> None:
    meter = Meter(True)
    add(meter, float("nan"))
    add(meter, 3.0)

    assert meter.read(2) == 1.5


def test_without_the_filter_a_bad_loss_shows() -> None:
    meter = Meter(False)
    add(meter, 1.0)
    add(meter, float("inf"))

    assert meter.read(2) == float("inf")


def test_gradients_that_are_not_finite_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(True)
    add(meter, 1.0, float("nan"))
    add(meter, 1.0)
    with caplog.at_level(logging.WARNING):
        assert meter.read(2) == 1.0
    assert "1 of the last 2 updates" in caplog.text
    caplog.clear()
    add(meter, 1.0)
    meter.read(3)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_restored_meter_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    meters = [Meter(True), Meter(True)]
    losses = (torch.rand(9, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)

    def feed(meter: Meter, step: int) -> None:
        norm = torch.tensor(float("nan") if step == 5 else 1.0)
        meter.add({"loss": losses[step - 1], "grad_norm": norm, "lr": RATE / step})

    for step in range(1, 6):
        feed(meters[0], step)
        if step == 3:
            meters[0].read(3)
    stored = json.loads(json.dumps(meters[0].state()))
    meters[1].restore(stored)

    assert meters[1].state() == meters[0].state()
    assert meters[1].latest["learning_rate"] == meters[0].latest["learning_rate"] == 0.1 / 5
    for step in range(6, 10):
        for meter in meters:
            feed(meter, step)
    assert meters[0].read(9) == meters[1].read(9)
    assert meters[0].mean(9) == meters[1].mean(9)


def test_norm_and_rate_are_those_of_the_last_update() -> None:
    meter = Meter(True)
    add(meter, 1.0, 2.0)
    add(meter, 1.0, 3.5)

    assert meter.latest == {"grad_norm": 3.5, "learning_rate": 0.1}
    meter.read(2)
    assert meter.latest == {"grad_norm": 3.5, "learning_rate": 0.1}


def test_a_long_run_without_logs_is_folded_into_sums() -> None:
    meter, step = Meter(True), 3000
    for i in range(step):
        add(meter, float(i % 7))

    assert len(meter._waiting) < 1100
    assert meter.mean(step) == sum(i % 7 for i in range(step)) / step
    assert meter.read(step) == sum(i % 7 for i in range(step)) / step


def test_adding_reads_nothing() -> None:
    meta = torch.zeros((), device="meta")  # cannot be read
    meter = Meter(True)
    for _ in range(3):
        meter.add({"loss": meta, "grad_norm": meta, "lr": meta})
    assert meter.pending


def test_an_empty_meter_can_be_stored() -> None:
    meter, other = Meter(True), Meter(True)
    add(meter, 1.25)
    meter.read(1)
    other.restore(json.loads(json.dumps(meter.state())))

    assert not other.pending
    assert other.mean(1) == 1.25


def test_micro_batches_are_added_one_by_one() -> None:
    meter, running = Meter(True), torch.zeros(())
    shares = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    for number in range(40):
        few = shares[number][: 1 + number % 3]
        metrics = {"loss": few.sum(), "grad_norm": torch.tensor(1.0), "lr": RATE}
        meter.add(metrics, list(few) if len(few) > 1 else [])
        for share in few:
            running += share

    assert meter.read(40) == float(running) / 40
    assert float(running) != float(sum(row[: 1 + n % 3].sum() for n, row in enumerate(shares)))


def test_a_micro_batch_that_is_not_finite_makes_its_update_count_as_such(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = Meter(True)
    for losses in ([1.0, 2.0], [float("inf"), 3.0]):
        metrics = {"loss": torch.tensor(sum(losses)), "grad_norm": torch.tensor(1.0), "lr": RATE}
        meter.add(metrics, [torch.tensor(loss) for loss in losses])

    # As the Hugging Face Trainer counts: the sum so far over the updates so far, for each such loss.
    assert meter.read(2) == (3.0 + 3.0 / 2 + 3.0) / 2
    assert "1 of the last 2 updates" in caplog.text


def test_a_training_gives_it_every_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, add_to = [], Meter.add

    def add(self: Meter, metrics: Any, losses: Any = ()) -> None:
        given.append((metrics["loss"], list(losses)))
        add_to(self, metrics, losses)

    monkeypatch.setattr(Meter, "add", add)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    make_trainer(tmp_path, train=samples(7), num_train_epochs=1, **options).train()

    assert [len(losses) for _, losses in given] == [3, 3, 0]
    for loss, (first, second, third) in given[:2]:
        assert torch.equal(loss, first + second + third)
