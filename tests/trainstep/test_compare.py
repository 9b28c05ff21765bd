"""Digests and differences: equality of bits, and where it ends."""

import math
import struct
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainstep as ts
from support import models
from support.processes import python
from trainstep.compare import ulp_distance

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def state() -> ts.TrainState:
    module = models.build("batch_norm")
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
    return step(step.init(module), models.batch())[0]


def test_digest_is_hexadecimal_and_known() -> None:
    # Manifests hold digests, so this may never change.
    tree = {"b": torch.tensor([1.0, -0.0]), "a": [torch.tensor(3), 0.5, None, "text"]}
    assert ts.digest(tree) == "f1737d178b645ea528c7812030459c38ff00d6839d58797c16774b532e282441"


def test_digest_ignores_the_order_of_insertion_and_the_strides() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    assert ts.digest({"a": a, "b": b}) == ts.digest({"b": b, "a": a})
    assert ts.digest({"a": a.t().contiguous().t(), "b": b}) == ts.digest({"a": a, "b": b})
    assert ts.digest({"a": a.clone().requires_grad_()}) == ts.digest({"a": a})


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([0.0, 2.0])},
        {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"x": torch.tensor([[1.0, 2.0]])},
        {"y": torch.tensor([1.0, 2.0])},
        {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(0)},
        {"x": [1.0, 2.0]},
        {},
    ],
)
def test_digest_sees_values_dtypes_shapes_and_names(other: Any) -> None:
    one = {"x": torch.tensor([1.0, 2.0])}
    assert ts.digest(one) != ts.digest(other)
    assert not ts.equal(one, other)


def test_digest_sees_the_sign_of_zero_and_the_payload_of_nan() -> None:
    zeros = [torch.tensor([0.0]), torch.tensor([-0.0])]
    assert ts.digest(zeros[0]) != ts.digest(zeros[1])
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert ts.digest(bits[:1]) != ts.digest(bits[1:])
    assert ts.equal(bits, bits.clone()), "NaN equals the same NaN"
    assert not ts.equal(bits[:1], bits[1:])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_every_dtype_has_a_digest_and_a_diff(dtype: torch.dtype) -> None:
    x = torch.tensor([1, 0, 1]).to(dtype)
    y = torch.tensor([1, 1, 1]).to(dtype)
    assert ts.digest(x) != ts.digest(y)
    assert ts.equal(x, x.clone())
    assert "first at (1,)" in ts.diff(x, y)[0].what


def test_digest_of_a_state_counts_step_and_key_wherever_it_is() -> None:
    one = state()
    for other in (one.evolve(step=7), one.evolve(key=ts.rng.key(8))):
        for wrap in (lambda s: s, lambda s: [s], lambda s: {"a": (s, torch.ones(1))}):
            assert ts.digest(wrap(one)) != ts.digest(wrap(other))
            assert not ts.equal(wrap(one), wrap(other))
    assert [d.path for d in ts.diff(one, one.evolve(step=7))] == ["step"]
    assert [d.path for d in ts.diff([one], [one.evolve(step=7)])] == ["0/step"]


def test_digest_is_stable_across_processes() -> None:
    code = """
import torch, trainstep as ts
from support import models
torch.set_num_threads(1)
module = models.build("dropout")
step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
state = step.init(module)
for batch in models.batches(3):
    state, _ = step(state, batch)
print(ts.digest(state))
"""
    module = models.build("dropout")
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
    here = step.init(module)
    for batch in models.batches(3):
        here, _ = step(here, batch)
    assert python(code, PYTHONHASHSEED="1") == ts.digest(here)


def test_diff_names_path_count_index_and_ulps() -> None:
    a = {"m": {"w": torch.ones(2, 3)}, "same": torch.zeros(1)}
    b = ts.tree.clone(a)
    b["m"]["w"][1, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    b["m"]["w"][1, 2] = 1.5
    (found,) = ts.diff(a, b)
    assert found.path == "m/w"
    assert found.what == "2 of 6 differ, first at (1, 0); max abs 0.5, max rel 0.333"
    assert found.max_ulp == 2**22
    assert ts.diff(a, a) == []


def test_diff_names_leaves_of_one_side_and_other_dtypes_shapes_and_values() -> None:
    a = {"only": torch.zeros(1), "t": torch.zeros(2), "n": 1, "kind": 1, "leaf": torch.zeros(1)}
    b = {"t": torch.zeros(2, 1), "n": 2, "kind": True, "leaf": 0.0, "new": None}
    found = {d.path: d.what for d in ts.diff(a, b)}
    assert found == {
        "only": "only in the first",
        "new": "only in the second",
        "t": "torch.float32 (2,) != torch.float32 (2, 1)",
        "n": "1 != 2",
        "kind": "1 != True",
        "leaf": "tensor([0.]) != 0.0",
    }
    assert all(d.max_ulp is None for d in ts.diff(a, b))


def test_diff_of_scalars_and_of_states() -> None:
    (found,) = ts.diff(torch.tensor(1.0), torch.tensor(2.0))
    assert "first at ()" in found.what
    one = state()
    changed = {**one.params, "0.bias": one.params["0.bias"] + 1}
    assert [d.path for d in ts.diff(one, one.evolve(params=changed))] == ["params/0.bias"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_count_representable_numbers(dtype: torch.dtype) -> None:
    def ulp(a: float | Tensor, b: float | Tensor) -> int:
        pair = (torch.as_tensor(x, dtype=dtype).reshape(1) for x in (a, b))
        return int(ulp_distance(*pair))

    above = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype))
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ulp(1.0, 1.0) == 0
    assert ulp(1.0, above) == ulp(above, 1.0) == 1
    assert ulp(0.0, -0.0) == 0
    assert ulp(tiny, -tiny) == 2
    assert ulp(1.0, 2.0) == round(1 / torch.finfo(dtype).eps)
    assert ulp(float("nan"), 1.0) == torch.iinfo(torch.int64).max
    assert ulp(float("nan"), float("nan")) == 0
    assert ulp(-3.0, 3.0) >= ulp(-3.0, 2.0) > ulp(0.0, 3.0), "saturates instead of wrapping"


def test_integers_are_that_many_apart() -> None:
    assert ulp_distance(torch.tensor([3, -4]), torch.tensor([5, 4])).tolist() == [2, 8]


ARRAY = np.arange(1001, dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [
        np.where(ARRAY == 500, -1, ARRAY),  # in the middle, which repr leaves out
        ARRAY.astype(np.float64),
        ARRAY.reshape(7, 143),
        torch.from_numpy(ARRAY),
    ],
)
def test_numpy_arrays_count_by_dtype_shape_and_bits(other: Any) -> None:
    assert ts.digest([ARRAY]) == ts.digest([ARRAY.copy()])
    assert ts.equal([ARRAY], [np.repeat(ARRAY, 2)[::2]]), "strides do not count"
    assert ts.digest([ARRAY]) != ts.digest([other])
    assert not ts.equal([ARRAY], [other])


def test_differences_of_arrays_are_named() -> None:
    a = {"x": np.array([[1.0, 0.0], [np.nan, 2.0]]), "d": np.float32(1), "t": np.array(["a", "b"])}
    b = {"x": np.array([[1.0, -0.0], [np.nan, 3.0]]), "d": np.float64(1), "t": np.array(["a", "c"])}
    assert {d.path: d.what for d in ts.diff(a, b)} == {
        "x": "2 of 4 differ, first at (0, 1)",
        "d": "numpy float32 () != float64 ()",
        "t": "1 of 2 differ, first at (1,)",
    }
    assert ts.diff(a, dict(a)) == []
    assert ts.equal(np.zeros((0, 3)), np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ("1", b"1"),
        (None, "None"),
        (complex(0, 0.0), complex(0, -0.0)),
        (struct.unpack(">d", bytes.fromhex("7ff8000000000001"))[0], math.nan),
        (complex(math.nan, 0.0), complex(math.nan, -0.0)),
        (1.0, np.float64(1.0)),
    ],
)
def test_scalars_count_by_type_and_bits(a: Any, b: Any) -> None:
    assert ts.equal([a, b], [a, b])
    assert ts.digest([a]) != ts.digest([b])
    assert not ts.equal([a], [b])


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"net": torch.nn.Linear(1, 1)}, r"net is a torch\.nn\.modules\.linear\.Linear, which"),
        (torch.nn.Linear(1, 1), r"the tree is a torch.*pass dict\(module\.state_dict\(\)\)"),
        ({"a": [object()]}, r"a/0 is a builtins\.object"),
        ({"a": {1, 2}}, r"a is a builtins\.set"),
        (np.array([object()]), "the tree is a NumPy array of object"),
    ],
)
def test_what_has_no_bits_is_refused(tree: Any, text: str) -> None:
    for use in (ts.digest, lambda t: ts.diff(t, t), lambda t: ts.equal(t, {}), ts.leaf_digests):
        with pytest.raises(TypeError, match=text):
            use(tree)


def test_mappings_count_as_dicts() -> None:
    inner = {"x": torch.ones(2), "n": 1}
    assert ts.digest({"a": UserDict(inner)}) == ts.digest({"a": inner})
    assert ts.diff(UserDict(inner), inner) == []
    changed = UserDict({**inner, "x": torch.zeros(2)})
    assert [d.path for d in ts.diff([UserDict(inner)], [changed])] == ["0/x"]


def test_stacks_have_digests_too() -> None:
    one = state()
    pair = ts.vmap.stack([one.evolve(extras={"n": 1.0}), one.evolve(extras={"n": -0.0})])
    other = ts.vmap.stack([one.evolve(extras={"n": 1.0}), one.evolve(extras={"n": 0.0})])
    assert ts.equal(pair, pair)
    assert [d.path for d in ts.diff(pair, other)] == ["extras/n"]
    assert ts.digest(pair) != ts.digest(other)
