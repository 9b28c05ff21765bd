"""States as JSON: what comes back is what was given, to the type and the bit."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.states import decode, encode, exact, stateful


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        *[None, True, 3, -(2**70), 0.1, float("inf"), "text", b"\x00\xff", [], (), {}],
        {"a": [1, (2, {"b": None})], "": ()},
        {1: "an int", (1, 2): "a tuple", None: 0.5},
        {"$tuple": [1], "a": {"$float": "nan"}},
        random.Random(1).getstate(),
    ],
)
def test_plain_values_come_back(value: Any) -> None:
    again = through_json(value)
    assert again == value
    assert repr(again) == repr(value)  # types included


def test_not_a_number_comes_back() -> None:
    assert np.isnan(through_json([float("nan")])[0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
        torch.tensor(7),
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.Generator().manual_seed(1).get_state(),
    ],
)
def test_tensors_come_back_to_the_bit(tensor: torch.Tensor) -> None:
    again = through_json({"t": tensor})["t"]
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert again.reshape(-1).view(torch.uint8).tolist() == (
        tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    )


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3).T,
        np.array([], dtype=np.float16),
        np.array(["a", "bc"]),
        np.int64(5),
        np.float32(0.1),
        np.bool_(True),
    ],
)
def test_arrays_and_scalars_come_back(array: Any) -> None:
    again = through_json([array])[0]
    assert type(again) is type(array)
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)


def test_what_comes_back_can_be_changed() -> None:
    through_json(np.arange(3))[0] = 9
    through_json(torch.arange(3)).add_(1)


def test_a_state_is_a_snapshot() -> None:
    live = {"a": [1], "t": torch.zeros(2)}
    kept = encode(live)
    live["a"].append(2)
    live["t"].add_(1)  # type: ignore[attr-defined]
    again = decode(kept)
    assert again["a"] == [1]
    assert again["t"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, {1, 2}]}, r"dataset\['a'\]\[1\] is a set, which a checkpoint cannot hold"),
        ({"f": len}, r"dataset\['f'\] is a builtin_function_or_method"),
        ({"o": np.array([None])}, r"dataset\['o'\] is a ndarray"),
        ({object(): 1}, "a key of dataset is a object"),
        (torch.zeros(2).to_sparse(), "dataset is a Tensor"),
        (torch.Size([1]), "dataset is a Size.* Let state_dict\\(\\) return numbers"),
    ],
)
def test_other_values_are_refused_by_their_place(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(value, "dataset")


def test_what_has_a_state() -> None:
    assert stateful(torch.nn.Linear(1, 1))
    assert not stateful([1])
    assert not stateful(type("Half", (), {"state_dict": dict}))


def test_a_shuffle_buffer_makes_a_state_inexact() -> None:
    class Dataset:
        state_dict = load_state_dict = dict
        _ex_iterable: Any = None

    class BufferShuffledExamplesIterable:
        pass

    class Node:
        def __init__(self, *inner: Any) -> None:
            self.ex_iterables = inner

    dataset = Dataset()
    assert exact(dataset)
    dataset._ex_iterable = Node(Node(), Node())
    assert exact(dataset)
    dataset._ex_iterable = Node(Node(), Node(BufferShuffledExamplesIterable()))
    assert not exact(dataset)
