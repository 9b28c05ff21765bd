"""A state as flat tensors and JSON, and back, without losing a bit."""

import json
from typing import Any

import attrs
import pytest
import torch

import trainstep as ts
from support import models
from trainstep.serialize import check_like, from_flat, to_flat


def trained(name: str = "batch_norm", optimizer: Any = None) -> ts.TrainState:
    module = models.build(name)
    step = ts.make_step(
        ts.module_loss(module, models.mean_loss),
        optimizer or ts.optim.adamw(),
        on_nonfinite="skip",
    )
    return step(step.init(module, seed=3), models.batch())[0]


def through_json(metadata: Any) -> Any:
    return json.loads(json.dumps(metadata))


OPTIMIZERS = {
    "adamw": lambda: ts.optim.adamw(amsgrad=True),
    "sgd": lambda: ts.optim.sgd(),
    "wrapped": lambda: ts.optim.from_torch(torch.optim.Adafactor),
    "partition": lambda: ts.optim.partition(
        {"bias": "b", ".*": "w"},
        {"b": ts.optim.sgd(), "w": ts.optim.from_torch(torch.optim.RAdam)},
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["batch_norm", "frozen", "tied", "counting"])
def test_there_and_back_is_the_same_state(name: str, optimizer: str) -> None:
    state = trained(name, OPTIMIZERS[optimizer]())
    tensors, metadata = to_flat(state)
    again = from_flat(tensors, through_json(metadata))
    assert ts.digest(again) == ts.digest(state)
    assert ts.equal(again, state)
    assert ts.tree.flatten(again)[1] == ts.tree.flatten(state)[1], "also lists, tuples and order"


def test_paths_are_those_of_diff_and_nothing_is_copied() -> None:
    state = trained()
    tensors, _ = to_flat(state)
    leaves = dict(ts.tree.leaves_with_paths(state))
    assert tensors.keys() == {p for p, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    assert all(t.data_ptr() == leaves[path].data_ptr() for path, t in tensors.items())


def test_leaves_that_are_no_tensors() -> None:
    extras = {
        "float": [0.1, float("inf"), -0.0, 1e-320],
        "many": (1, True, None, "text", 2**70),
        "empty": [{}, (), []],
        7: "a number as key",
    }
    state = ts.TrainState(2**40, {}, {}, (), ts.rng.Key(2**64 - 1), extras)
    again = from_flat({}, through_json(to_flat(state)[1]))
    assert again.extras == extras
    assert [type(v) for v in again.extras["many"]] == [type(v) for v in extras["many"]]
    assert str(again.extras["float"][2]) == "-0.0"
    assert (again.step, again.key, again.opt_state) == (2**40, state.key, ())
    nan = state.evolve(extras={"nan": float("nan")})
    assert from_flat({}, through_json(to_flat(nan)[1])).extras["nan"] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int32])
def test_dtypes_and_shapes_are_checked_against_the_metadata(dtype: torch.dtype) -> None:
    state = trained().evolve(extras={"x": torch.ones(2, 3).to(dtype)})
    tensors, metadata = to_flat(state)
    tensors["extras/x"] = torch.zeros(3, 2, dtype=dtype)
    with pytest.raises(ValueError, match=r"differs: extras/x is .* \(3, 2\), expected .* \(2, 3\)"):
        from_flat(tensors, metadata)
    tensors["extras/x"] = torch.zeros(2, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match=rf"is torch.float16 \(2, 3\), expected {dtype} \(2, 3\)"):
        from_flat(tensors, metadata)


def test_missing_and_unexpected_tensors_are_all_named() -> None:
    tensors, metadata = to_flat(trained())
    del tensors["params/0.weight"], tensors["opt_state/exp_avg/2.bias"]
    tensors["params/other"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit the metadata") as caught:
        from_flat(tensors, metadata)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: params/0.weight",
        "  missing: opt_state/exp_avg/2.bias",
        "  unexpected: params/other",
    ]


def test_another_format_is_refused() -> None:
    tensors, metadata = to_flat(trained())
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        from_flat(tensors, {**metadata, "format": 99})
    with pytest.raises(ValueError, match="format None"):
        from_flat(tensors, {})


def test_other_leaves_are_refused_with_their_path() -> None:
    @attrs.frozen
    class Record:
        x: int = 1

    for leaf, name in ((Record(), "Record"), ({1, 2}, "set"), (1j, "complex")):
        state = trained().evolve(extras={"a": [leaf]})
        with pytest.raises(TypeError, match=rf"to_flat: extras/a/0 is a {name}; a state holds"):
            to_flat(state)


def test_two_leaves_of_one_path_are_refused() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    state = trained().evolve(extras={"a": {"b": one}, "a/b": two})
    with pytest.raises(ValueError, match="two leaves have the path extras/a/b"):
        to_flat(state)


def test_check_like_accepts_the_same_model_and_lists_what_differs() -> None:
    state, other = trained("batch_norm"), trained("mlp")
    check_like(state, trained("batch_norm"))
    with pytest.raises(
        ValueError, match="the state does not fit this model or optimizer:"
    ) as caught:
        check_like(other, state)
    lines = str(caught.value).splitlines()
    assert "  missing: params/1.weight" in lines
    assert "  missing: buffers/1.running_mean" in lines
    wide = {**state.params, "0.bias": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"differs: params/0.bias is .*\(9,\), expected .*\(6,\)"):
        check_like(state.evolve(params=wide), state)
    half = {n: p.half() for n, p in state.params.items()}
    with pytest.raises(ValueError, match=r"is torch\.float16 .*, expected torch\.float32"):
        check_like(state.evolve(params=half), state)
    with pytest.raises(ValueError, match=r"unexpected: params/1\.weight"):
        check_like(state, other)


def test_tensors_may_be_non_contiguous() -> None:
    state = ts.init({"w": torch.ones(2, 3).t()}, ts.optim.sgd())
    tensors, metadata = to_flat(state)
    assert tensors["params/w"].stride() == (1, 3)
    written = {path: tensor.contiguous() for path, tensor in tensors.items()}
    assert ts.equal(from_flat(written, metadata), state)
