"""Outputs of batches, kept and joined once."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from trainer.evaluation.collected import Collected, join

Point = namedtuple("Point", "x y")


def test_structures_are_joined() -> None:
    parts = [{"a": [np.zeros((2, w))], "b": Point(np.array(w), np.ones(1))} for w in (1, 3)]
    joined = join(parts)

    assert joined["a"][0].tolist() == [[0, -100, -100]] * 2 + [[0, 0, 0]] * 2
    assert type(joined["b"]) is Point
    assert joined["b"].x.tolist() == [1, 3]
    assert join([np.zeros((1, w), int) for w in (2, 1)], padding=7).tolist() == [[0, 0], [0, 7]]


@pytest.mark.parametrize(
    ("second", "difference"),
    [
        ((np.ones(1),), "a tuple of 1 where batch 0 has a tuple of 2"),
        ([np.ones(1)] * 2, "a list of 2 where batch 0 has a tuple of 2"),
        (np.ones(1), "a value of type ndarray where batch 0 has a tuple of 2"),
        ({"a": np.ones(1)}, "a dict of a where batch 0 has a tuple of 2"),
    ],
)
def test_batches_of_different_structure_are_refused(second: Any, difference: str) -> None:
    with pytest.raises(TypeError, match=rf"^logits: batch 2 has {difference}, so they cannot"):
        join([(np.ones(1),) * 2, (np.ones(1),) * 2, second], "logits")


def test_differences_deep_inside_are_located() -> None:
    first, second = ({"a": (np.ones(1), {key: np.ones(1)})} for key in "xy")
    with pytest.raises(
        TypeError, match=r"^outputs\['a'\]\[1\]: batch 1 has a dict of y where batch"
    ):
        join([first, second])
    with pytest.raises(
        ValueError,
        match=r"^outputs\['a'\]: batch 1 has the shape \(2, 3, 5\) and batch 0 \(2, 3, 4\); only the "
        r"first two axes may differ.*preprocess_logits_for_metrics.*eval_do_concat_batches=False",
    ):
        join([{"a": np.ones((2, 3, n))} for n in (4, 5)])


def test_objects_are_refused_unless_asked_for() -> None:
    with pytest.raises(
        TypeError, match=r"cannot join values of type str; expected.*eval_use_gather_object=True"
    ):
        join(["a", "b"])
    assert join(["a", "b"], objects=True) == ["a", "b"]
    boxes = [[{"n": 1}, {"n": 2}], [{"m": "x"}]]
    assert join(boxes, objects=True) == [{"n": 1}, {"n": 2}, {"m": "x"}]
    joined = join([(np.ones(2), part) for part in boxes], objects=True)
    assert joined[0].tolist() == [1, 1, 1, 1]
    assert joined[1] == [{"n": 1}, {"n": 2}, {"m": "x"}]


def test_what_only_some_batches_have_is_refused() -> None:
    kept = Collected("labels")
    for value in (None, torch.ones(2), None):
        kept.add(value)
    with pytest.raises(
        ValueError, match=r"^2 of 3 batches have no labels, so rows would not belong"
    ):
        kept.result()
    empty = Collected("labels")
    empty.add(None)
    assert empty.result() is None


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batches", [3, 40])
def test_every_number_is_copied_once_when_joining(
    ragged: bool, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    joined, filled = np.concatenate, np.full

    def concatenate(arrays: Any, **options: Any) -> Any:
        calls.append(len(arrays))
        return joined(arrays, **options)

    def full(shape: Any, *rest: Any, **options: Any) -> Any:
        calls.append(shape[0])
        return filled(shape, *rest, **options)

    monkeypatch.setattr(np, "concatenate", concatenate)
    monkeypatch.setattr(np, "full", full)
    kept = Collected("logits", every=2)
    for number in range(batches):
        kept.add(torch.ones(1, 2 + ragged * number % 3))
    assert kept.result().shape[0] == batches
    assert calls == [batches]  # one joining of all, whatever their number


def test_a_slice_does_not_keep_all_of_its_tensor() -> None:
    whole = torch.arange(12.0).view(3, 4)
    kept = Collected("logits")
    kept.add((whole[:, :1], whole))
    part, same = kept._parts[0]

    assert part.untyped_storage().nbytes() == 3 * 4
    assert same.data_ptr() == whole.data_ptr()  # what is kept whole is not copied
    expanded = torch.ones(1).expand(5)
    kept.add((expanded, whole.requires_grad_()))
    assert kept._parts[1][0].data_ptr() == expanded.data_ptr()
    assert not kept._parts[1][1].requires_grad


@pytest.mark.row(73)
def test_device_tensors_are_let_go_after_so_many_batches() -> None:
    kept = Collected("logits", every=2)
    for _ in range(5):
        kept.add(torch.ones(3, dtype=torch.bfloat16))
    assert [type(part).__name__ for part in kept._parts] == ["ndarray"] * 4 + ["Tensor"]
    assert kept.result().shape == (15,)
