"""``TrainState``: an immutable record and a pytree."""

import pickle

import pytest
import torch
from attrs.exceptions import FrozenInstanceError

import trainstep as ts
from trainstep import tree
from trainstep.state import consume


def make() -> ts.TrainState:
    return ts.TrainState(
        step=3,
        params={"w": torch.ones(2)},
        buffers={"b": torch.zeros(1)},
        opt_state={"m": {"w": torch.zeros(2)}},
        key=ts.rng.key(0),
        extras={"n": torch.tensor(4)},
    )


def test_it_is_frozen_and_compared_by_identity() -> None:
    state = make()
    with pytest.raises(FrozenInstanceError):
        state.step = 4  # type: ignore[misc]
    assert state == state
    assert state != make()
    assert isinstance(hash(state), int)


def test_evolve_replaces_fields_and_shares_the_others() -> None:
    state = make()
    after = state.evolve(step=9)
    assert (state.step, after.step) == (3, 9)
    assert after.params is state.params
    with pytest.raises(TypeError, match="sterp"):
        state.evolve(sterp=1)


def test_tensors_are_leaves_and_step_and_key_are_static() -> None:
    state = make()
    paths = [path for path, _ in tree.leaves_with_paths(state)]
    assert paths == ["params/w", "buffers/b", "opt_state/m/w", "extras/n"]
    doubled = tree.map(lambda t: t * 2, state)
    assert isinstance(doubled, ts.TrainState)
    assert (doubled.step, doubled.key) == (3, state.key)
    assert doubled.params["w"].tolist() == [2.0, 2.0]


def test_it_survives_pickling() -> None:
    # For sending to another process; checkpoints do not use it.
    assert ts.equal(pickle.loads(pickle.dumps(make())), make())


USES = {
    "params": lambda state: state.params,
    "step": lambda state: state.step,
    "key": lambda state: state.key,
    "extras": lambda state: state.extras,
    "evolve": lambda state: state.evolve(step=1),
    "leaves": tree.leaves,
    "digest": ts.digest,
    "diff": lambda state: ts.diff(state, make()),
    "to_flat": ts.serialize.to_flat,
}


@pytest.mark.parametrize("use", USES)
def test_a_consumed_state_refuses_every_use_and_names_the_step(use: str) -> None:
    state = make()
    consume(state)
    with pytest.raises(RuntimeError, match=r"donated at step 3.*without trainstep\.donate"):
        USES[use](state)


def test_a_consumed_state_can_still_be_looked_at() -> None:
    state = make()
    consume(state)
    assert repr(state) == "<TrainState consumed at step 3>"
    assert isinstance(state, ts.TrainState)
    assert not hasattr(state, "__array__")


def test_it_is_described_in_short() -> None:
    state = make().evolve(params={"w": torch.ones(50, 40), "b": torch.ones(1).bfloat16()})
    assert repr(state) == (
        "TrainState(step=3, params=<2 tensors, 2,001 numbers, bfloat16, float32>, "
        f"key=Key(bits={ts.rng.key(0).bits}))"
    )
    pair = ts.vmap.stack([make(), make()])
    assert "key=Keys(bits=(" in repr(pair)
    assert "0 tensors" in repr(tree.map(lambda t: None, make()))
