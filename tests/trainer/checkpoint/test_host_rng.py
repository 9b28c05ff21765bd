"""The host's random states survive JSON exactly."""

import json
import random

import numpy as np
import pytest
import torch

from trainer.checkpoint import host_rng


def draw() -> list[float]:
    """Draw from every library, normal values among them: those leave a half-used pair behind."""
    legacy = [*np.random.random_sample(3), np.random.standard_normal()]  # noqa: NPY002
    torch_values = torch.rand(3).tolist() + torch.randn(1).tolist()
    return [random.random(), random.gauss(0, 1), *legacy, *torch_values]


@pytest.fixture(autouse=True)
def unchanged():
    """Put the states back after each test."""
    before = host_rng.capture()
    yield
    host_rng.restore(before)


@pytest.mark.row(95)
@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_draws_continue_as_if_nothing_happened(drawn):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    for _ in range(drawn):
        draw()
    text = json.dumps(host_rng.capture(), allow_nan=False)
    expected = [draw() for _ in range(5)]
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    host_rng.restore(json.loads(text))
    assert [draw() for _ in range(5)] == expected


def test_capturing_draws_nothing():
    first = host_rng.capture()
    assert host_rng.capture() == first


def test_generators_that_are_not_named_are_left_alone():
    torch.manual_seed(3)
    state = {"torch": host_rng.capture()["torch"]}
    expected = torch.rand(2)
    random.seed(4)
    host_rng.restore(state)
    assert torch.equal(torch.rand(2), expected)
    assert random.random() == random.Random(4).random()


def test_states_of_absent_devices_are_ignored():
    state = host_rng.capture()
    host_rng.restore({**state, "cuda": [*state.get("cuda", []), state["torch"]]})
    assert host_rng.capture() == state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_continue():
    torch.cuda.manual_seed_all(5)
    torch.rand(3, device="cuda")
    text = json.dumps(host_rng.capture())
    expected = torch.rand(5, device="cuda")
    host_rng.restore(json.loads(text))
    assert torch.equal(torch.rand(5, device="cuda"), expected)
