"""Values of log records become plain JSON values."""

from __future__ import annotations

import decimal
import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.callbacks import to_jsonable


class Colour(str, enum.Enum):  # noqa: UP042 - its str() is not its value, as in transformers
    RED = "red"


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.1, 0.1),
        ("a", "a"),
        (Text("a"), "a"),
        (math.inf, math.inf),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([0.5]), 0.5),
        (np.array([[7]]), 7),
        (np.array([0.25, 0.5]), [0.25, 0.5]),
        (np.array([]), []),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([3]), 3),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (Colour.RED, "red"),
        (Path("a/b"), str(Path("a/b"))),
        ((1, np.int32(2)), [1, 2]),
        ({3}, [3]),
        ({"a": {1: np.float16(0.5)}}, {"a": {"1": 0.5}}),
        ({Colour.RED: 1}, {"red": 1}),
    ],
    ids=repr,
)
def test_values(value: Any, expected: Any) -> None:
    result = to_jsonable(value)
    assert result == expected
    assert type(result) is type(expected)
    assert json.loads(json.dumps(result)) == expected


def test_other_objects_become_text_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    record = {"loss": 0.5, "price": decimal.Decimal("1.5")}
    assert to_jsonable(record) == {"loss": 0.5, "price": "1.5"}
    to_jsonable(record)
    assert [text for text in caplog.messages if "'price' holds a Decimal" in text] == (
        caplog.messages
    )
    assert len(caplog.messages) == 1


def test_the_argument_stays_as_it_is() -> None:
    record = {"loss": np.float32(0.5), "sizes": (1, 2)}
    to_jsonable(record)
    assert record == {"loss": np.float32(0.5), "sizes": (1, 2)}
    assert type(record["loss"]) is np.float32
