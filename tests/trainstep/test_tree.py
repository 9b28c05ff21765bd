"""Pytrees: paths, copies, norms."""

from collections import UserDict, namedtuple

import pytest
import torch

from trainstep import tree

Pair = namedtuple("Pair", ["left", "right"])


def test_paths_name_keys_positions_and_fields() -> None:
    value = {"a.b": [torch.zeros(1), (2.0,)], "p": Pair(None, "text")}
    assert [path for path, _ in tree.leaves_with_paths(value)] == [
        "a.b/0",
        "a.b/1/0",
        "p/left",
        "p/right",
    ]


def test_registered_records_are_nodes_with_static_context() -> None:
    class Record:
        def __init__(self, x: torch.Tensor, y: torch.Tensor, note: str) -> None:
            self.x, self.y, self.note = x, y, note

    tree.register(
        Record, ("x", "y"), lambda r: ([r.x, r.y], r.note), lambda kids, note: Record(*kids, note)
    )
    record = Record(torch.ones(2), torch.zeros(3), "kept")
    assert [path for path, _ in tree.leaves_with_paths({"r": record})] == ["r/x", "r/y"]
    doubled = tree.map(lambda leaf: leaf * 2, record)
    assert (doubled.note, doubled.x.tolist()) == ("kept", [2.0, 2.0])
    leaves, spec = tree.flatten(record)
    assert tree.unflatten(leaves, spec).y is record.y


@pytest.mark.parametrize("wrap", [lambda t: {"a": {"b": t}}, lambda t: [({"a": t},)], lambda t: t])
def test_clone_copies_every_tensor_and_shares_the_rest(wrap) -> None:  # type: ignore[no-untyped-def]
    tensor = torch.arange(3.0)
    copy = tree.leaves(tree.clone(wrap(tensor)))[0]
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    note = object()
    assert tree.clone({"n": note})["n"] is note


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"x": torch.zeros(5, 2)}, 5),
        ({"scale": torch.zeros(()), "x": torch.zeros(3)}, 3),
        ([(torch.zeros(4, 1),)], 4),
        ({"nested": {"x": torch.zeros(2)}}, 2),
        (UserDict({"x": torch.zeros(6)}), 6),
        ({"x": torch.zeros(())}, 1),
        ("text", 1),
        ({}, 1),
    ],
)
def test_batch_size_is_the_first_leading_axis(batch: object, size: int) -> None:
    assert tree.batch_size(batch) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_global_norm_has_the_bits_of_clip_grad_norm(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 3, generator=gen).to(dtype) for n in (1, 7, 40)]
    params = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
    for param, tensor in zip(params, tensors, strict=True):
        param.grad = tensor.clone()
    assert torch.equal(tree.global_norm(tensors), torch.nn.utils.clip_grad_norm_(params, 1e9))


def test_global_norm_of_nothing_and_of_mixed_dtypes() -> None:
    assert tree.global_norm([]).item() == 0.0
    mixed = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    assert tree.global_norm(mixed).item() == 5.0


def test_runs_of_one_dtype_keep_their_order() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2, dtype=torch.float64), torch.zeros(3)
    assert [[len(t) for t in run] for run in tree.by_device_and_dtype([a, b, c])] == [[1, 3], [2]]
    assert [[len(t) for t in run] for run in tree.by_device_and_dtype([a, c])] == [[1, 3]]
    assert tree.by_device_and_dtype([]) == []
