"""States stacked into one and taken apart again."""

import json
import re
from typing import Any

import pytest
import torch

import trainstep as ts
from support import models
from support.optimizers import OPTIMIZERS
from support.snapshots import untouched
from trainstep import optim, vmap
from trainstep.members import Keys, Members, Split


def state_of(seed: int, optimizer: ts.Optimizer | None = None, name: str = "mlp") -> ts.TrainState:
    return ts.init(models.build(name, seed=seed), optimizer or optim.adamw(), seed=seed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unstack_inverts_stack_for_every_optimizer(name: str) -> None:
    states = [state_of(i, OPTIMIZERS[name](), "batch_norm") for i in range(3)]
    with untouched(states):
        stacked = vmap.stack(states)
        members = vmap.unstack(stacked)
    assert [ts.digest(m) for m in members] == [ts.digest(s) for s in states]
    assert [m.key for m in members] == [s.key for s in states]


def test_leaves_get_a_leading_axis_and_keys_stay_static() -> None:
    states = [state_of(i) for i in range(3)]
    stacked = vmap.stack(states)
    assert stacked.params["0.weight"].shape == (3, *states[0].params["0.weight"].shape)
    assert stacked.opt_state["step"]["0.weight"].shape == (3,)
    assert stacked.step == 0
    assert isinstance(stacked.key, Keys)
    assert stacked.key.members == tuple(s.key for s in states)


def test_the_order_of_members_and_their_keys_is_part_of_the_digest() -> None:
    one, other = state_of(0), state_of(0).evolve(key=ts.rng.key(1))
    digests = {ts.digest(vmap.stack(pair)) for pair in ([one, other], [other, one], [one, one])}
    assert len(digests) == 3
    assert [d.path for d in ts.diff(vmap.stack([one, one]), vmap.stack([one, other]))] == ["key"]


def test_members_are_copies_unless_views_are_asked_for() -> None:
    stacked = vmap.stack([state_of(0), state_of(1)])
    for copy in (True, False):
        member = vmap.unstack(stacked, copy=copy)[1]
        shared = member.params["0.bias"].data_ptr() == stacked.params["0.bias"][1].data_ptr()
        assert shared is not copy


def test_strides_within_a_member_stay() -> None:
    weight = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)
    states = [ts.init({"w": weight, "t": torch.randn(3, 4).T}, optim.sgd()) for _ in range(2)]
    members = vmap.unstack(vmap.stack(states))
    for name in ("w", "t"):
        assert members[1].params[name].stride() == states[1].params[name].stride()
        assert torch.equal(members[1].params[name], states[1].params[name])


def test_what_is_no_tensor_is_kept_once_if_equal_and_per_member_if_not() -> None:
    states = [
        state_of(0).evolve(extras={"same": 1.5, "differs": i, "none": None}) for i in range(3)
    ]
    stacked = vmap.stack(states)
    assert stacked.extras == {"same": 1.5, "differs": Members((0, 1, 2)), "none": None}
    assert [m.extras["differs"] for m in vmap.unstack(stacked)] == [0, 1, 2]


def test_numbers_of_different_types_are_not_equal() -> None:
    states = [state_of(0).evolve(extras={"flag": value}) for value in (1, True)]
    assert [m.extras["flag"] is True for m in vmap.unstack(vmap.stack(states))] == [False, True]


def test_stacking_views_of_a_stack_gives_it_back() -> None:
    stacked = torch.randn(3, 4)
    split = Split(3)
    first, second, third = split.views({"a": stacked})
    assert split.stacked([first, second, third])["a"] is stacked
    turned = split.stacked([second, first, third])["a"]
    assert turned is not stacked
    assert torch.equal(turned, stacked[[1, 0, 2]])


def test_nothing_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="expected at least one state, got none"):
        vmap.stack([])


def test_members_must_be_at_one_step() -> None:
    with pytest.raises(ValueError, match=r"same step, got steps \[0, 3\]"):
        vmap.stack([state_of(0), state_of(1).evolve(step=3)])


def test_a_stack_is_not_stacked_again() -> None:
    with pytest.raises(TypeError, match="is a stack already; stack its members"):
        vmap.stack([vmap.stack([state_of(0)])])


def test_missing_leaves_are_named() -> None:
    other = state_of(1)
    other = other.evolve(params={**other.params, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="members 0 and 1 differ in structure") as caught:
        vmap.stack([state_of(0), other])
    assert "only in member 1: params/extra" in str(caught.value)


def test_other_containers_are_refused() -> None:
    states = [state_of(0).evolve(extras={"x": kind}) for kind in ([1], (1,))]
    with pytest.raises(ValueError, match="in another order or in other containers"):
        vmap.stack(states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.double(),
            "torch.float32 (6,) on cpu in member 0, torch.float64 (6,) on cpu in 1",
        ),
        (lambda p: p[:3], "torch.float32 (6,) on cpu in member 0, torch.float32 (3,) on cpu in 1"),
        (lambda p: 7, "torch.float32 (6,) on cpu in member 0, 7 in 1"),
    ],
)
def test_misshapen_leaves_are_named(change: Any, message: str) -> None:
    other = state_of(1)
    other = other.evolve(params={**other.params, "0.bias": change(other.params["0.bias"])})
    with pytest.raises(
        ValueError, match=re.escape(f"params/0.bias differs between members: {message}")
    ):
        vmap.stack([state_of(0), other])


def test_a_single_state_is_not_unstacked() -> None:
    with pytest.raises(TypeError, match=r"vmap.unstack: expected a stacked state.*vmap.stack\("):
        vmap.unstack(state_of(0))


@pytest.mark.parametrize("derive", [lambda k: k.fold_in(0), lambda k: k.split()])
def test_a_stacked_key_derives_nothing(derive: Any) -> None:
    key = vmap.stack([state_of(0), state_of(1)]).key
    with pytest.raises(TypeError, match=r"stack of 2 members.*vmap.ensemble\(step\).*unstack"):
        derive(key)


def test_a_step_for_one_state_refuses_a_stack() -> None:
    model = models.build("mlp")
    step = ts.make_step(ts.module_loss(model, models.mean_loss), optim.sgd())
    stacked = vmap.stack([step.init(model), step.init(model, seed=1)])
    with pytest.raises(TypeError, match=r"vmap.ensemble\(step\)"):
        step(stacked, models.batch())


@pytest.mark.parametrize("name", ["adamw", "from_torch", "scheduled"])
def test_a_stack_is_serialised_without_loss(name: str) -> None:
    states = [state_of(i, OPTIMIZERS[name]()).evolve(extras={"note": i}) for i in range(2)]
    stacked = vmap.stack(states)
    tensors, metadata = ts.serialize.to_flat(stacked)
    restored = ts.serialize.from_flat(tensors, json.loads(json.dumps(metadata)))
    assert ts.digest(restored) == ts.digest(stacked)
    assert [ts.digest(m) for m in vmap.unstack(restored)] == [ts.digest(s) for s in states]
