"""Tensors in tuples, lists and mappings."""

from typing import Any

import numpy as np
import pytest
import torch

from trainer.evaluation.nested import batch_length, plain_numbers, to_numpy


def test_batches_are_measured_by_their_first_tensor() -> None:
    zeros = torch.zeros(3, 2)
    assert batch_length({"name": "x", "deep": {"t": zeros}, "other": torch.zeros(5)}) == 3
    assert batch_length([zeros]) == 3
    assert batch_length(torch.zeros(())) == 1
    assert batch_length({"a": 1, "b": None}) == 0


def test_bfloat16_becomes_float32() -> None:
    array = to_numpy({"a": torch.ones(2, dtype=torch.bfloat16)})["a"]
    assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.array([[3]]), 3),
        (torch.tensor(2.0), 2.0),
        (np.arange(3), [0, 1, 2]),
        ({"a": (np.int64(1), [True])}, {"a": (1, [True])}),
        ("text", "text"),
    ],
)
def test_metrics_become_plain_numbers(value: Any, plain: Any) -> None:
    result = plain_numbers(value)

    assert result == plain
    assert type(result) is type(plain)
