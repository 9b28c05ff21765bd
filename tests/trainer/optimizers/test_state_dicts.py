"""State dicts: the pure state as PyTorch's classes load it, and the reverse, with equal bits after."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.reference import make_grads, make_params
from trainer.optimizers import Adopted, adopt
from trainer.optimizers.state_dicts import from_state_dict, to_state_dict

Make = Callable[[list[Any]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.1, fused=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, 0.1, amsgrad=True, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True),
    "dampening": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, dampening=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(
        groups, 0.1, momentum=0.9, centered=True, foreach=True
    ),
    "itself": lambda groups: torch.optim.NAdam(groups, 0.1),
}


def leaves_of(params: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(tensor.clone()) for name, tensor in params.items()}


def build(make: Make, leaves: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make an optimizer with two groups, in another order than the names have."""
    matrices = [p for p in leaves.values() if p.ndim > 1]
    others = [p for p in leaves.values() if p.ndim <= 1]
    return make([{"params": others}, {"params": matrices, "weight_decay": 0.1}])


def take_steps(
    optimizer: torch.optim.Optimizer, leaves: dict[str, Any], numbers: range, missing: bool
) -> None:
    for number in numbers:
        grads = make_grads(make_params(), number, missing)
        for name, leaf in leaves.items():
            leaf.grad = grads.get(name)
        optimizer.step()


class Pure:
    """An adopted optimizer and what it works on."""

    def __init__(self, make: Make) -> None:
        self.leaves = leaves_of(make_params())
        self.adopted: Adopted = adopt(
            build(make, self.leaves), {leaf: name for name, leaf in self.leaves.items()}
        )
        self.params = {name: leaf.data for name, leaf in self.leaves.items()}
        self.state = self.adopted.pure.init(self.params)
        self.state = self.adopted.attach(self.state)

    def take_steps(self, numbers: range, missing: bool) -> None:
        for number in numbers:
            grads = make_grads(make_params(), number, missing)
            _, self.state = self.adopted.pure.apply(
                self.params, grads, self.state, {"lr": 0.1}, donate=True
            )


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_their_class_goes_on_from_our_state(name: str, missing: bool) -> None:
    ours = Pure(MAKERS[name])
    ours.take_steps(range(4), missing)
    leaves = leaves_of(ours.params)
    theirs = build(MAKERS[name], leaves)
    theirs.load_state_dict(copy.deepcopy(to_state_dict(ours.adopted, ours.state, 4)))
    ours.take_steps(range(4, 8), missing)
    take_steps(theirs, leaves, range(4, 8), missing)
    assert all(torch.equal(leaves[n], ours.params[n]) for n in leaves)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_our_state_goes_on_from_theirs(name: str, missing: bool) -> None:
    leaves = leaves_of(make_params())
    theirs = build(MAKERS[name], leaves)
    take_steps(theirs, leaves, range(4), missing)
    ours = Pure(MAKERS[name])
    saved = copy.deepcopy(theirs.state_dict())
    ours.state = ours.adopted.attach(from_state_dict(ours.adopted, saved, ours.state, 4))
    for parameter_name, leaf in leaves.items():
        ours.params[parameter_name].copy_(leaf.data)
    take_steps(theirs, leaves, range(4, 8), missing)
    ours.take_steps(range(4, 8), missing)
    assert all(torch.equal(leaves[n], ours.params[n]) for n in leaves)


def saved_by(make: Make) -> dict[str, Any]:
    leaves = leaves_of(make_params())
    optimizer = build(make, leaves)
    take_steps(optimizer, leaves, range(2), missing=False)
    return copy.deepcopy(optimizer.state_dict())


def test_other_groups_are_an_error() -> None:
    ours, saved = Pure(MAKERS["adamw"]), saved_by(MAKERS["adamw"])
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"groups of \[1, 3\] parameters, this one of \[2, 3\]"):
        from_state_dict(ours.adopted, saved, ours.state, 2)


def test_another_optimizer_is_an_error() -> None:
    ours = Pure(MAKERS["adamw"])
    with pytest.raises(
        ValueError, match=r"keeps momentum_buffer for a\.bias, this one exp_avg, exp_avg_sq, step"
    ):
        from_state_dict(ours.adopted, saved_by(MAKERS["momentum"]), ours.state, 2)


def test_another_shape_is_an_error() -> None:
    ours, saved = Pure(MAKERS["adamw"]), saved_by(MAKERS["adamw"])
    saved["state"][0]["exp_avg"] = torch.zeros(9)
    with pytest.raises(
        ValueError, match=r"exp_avg of a.bias has the shape \(9,\), expected \(5,\)"
    ):
        from_state_dict(ours.adopted, saved, ours.state, 2)
