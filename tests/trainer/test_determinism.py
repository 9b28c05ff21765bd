"""Seeds and deterministic switches, and that the switches can be put back."""

import logging
import os
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainer import determinism
from trainer.data.seeding import WorkerInit
from trainer.determinism import enable_full_determinism, seed_worker, seeded_worker, set_seed

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUDA_LAUNCH_BLOCKING": "1",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "ASCEND_LAUNCH_BLOCKING": "1",
    "HCCL_DETERMINISTIC": "1",
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that the test's changes are undone
        monkeypatch.delenv(name)
    before = switches()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]


def switches() -> tuple[bool, bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002


def test_seeds_repeat_all_generators() -> None:
    set_seed(3)
    first = draws()
    assert draws() != first
    set_seed(3)
    assert draws() == first
    set_seed(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    set_seed(2**40)
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeding_can_switch_determinism_on() -> None:
    set_seed(0, deterministic=True)
    assert switches()[:2] == (True, False)


@pytest.mark.row(96)
@pytest.mark.parametrize("warn_only", [False, True])
def test_full_determinism_and_back(warn_only: bool) -> None:
    torch.backends.cudnn.benchmark = True
    os.environ["HCCL_DETERMINISTIC"] = "mine"
    before = switches()
    undo = enable_full_determinism(5, warn_only=warn_only)
    assert switches() == (True, warn_only, True, False)
    assert environment() == VARIABLES
    first = draws()
    undo()
    assert switches() == before
    assert environment() == {"HCCL_DETERMINISTIC": "mine"}
    set_seed(5)
    assert draws() == first


def test_nested_calls_are_undone_one_by_one() -> None:
    outer = enable_full_determinism(0, warn_only=True)
    inner = enable_full_determinism(0)
    inner()
    assert switches() == (True, True, True, False)
    assert environment() == VARIABLES
    outer()
    assert not switches()[0]
    assert environment() == {}


def test_a_workspace_that_is_deterministic_already_is_kept() -> None:
    for given, kept in ((":4096:8", ":4096:8"), (":0:0", ":16:8")):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = given
        undo = enable_full_determinism(0)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == kept
        undo()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == given


@pytest.mark.parametrize(("given", "late"), [(None, True), (":16:8", False)])
def test_being_late_is_warned_of(
    given: Any, late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if given:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = given
    with caplog.at_level(logging.WARNING, "trainer"):
        enable_full_determinism(0)()
    assert [("CUBLAS_WORKSPACE_CONFIG=:16:8" in m) for m in caplog.messages] == [True] * late


class Drawing(Dataset[Any]):
    """Every sample is what the worker draws."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return draws()


def worker_draws(rank: int) -> list[Any]:
    init = partial(seed_worker, num_workers=2, rank=rank)
    generator = torch.Generator().manual_seed(0)
    loader: DataLoader[Any] = DataLoader(
        Drawing(), batch_size=None, num_workers=2, worker_init_fn=init, generator=generator
    )
    return list(loader)


@pytest.mark.row(97)
def test_workers_of_different_ranks_draw_differently_and_repeatably() -> None:
    zero, one = worker_draws(0), worker_draws(1)
    assert zero == worker_draws(0)
    for position in range(3):
        values = {draw[position] for draw in (*zero, *one)}
        assert len(values) == 8


def test_the_seeding_of_workers_is_the_loaders() -> None:
    assert seeded_worker is WorkerInit
    assert determinism.seeded_worker(seed=1, rank=2) != seeded_worker(seed=1, rank=3)
