"""What is seen of a model: whatever Python may decide in its forward pass, and nothing else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer.circumstances import Circumstances, has_hooks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.register_buffer("scale", torch.ones(()))
        self.kl, self.name, self.layers = 0.0, "a", [1]
        self.config = SimpleNamespace(width=4)


def nothing(*args: Any) -> None:
    pass


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "number": (lambda m: setattr(m, "kl", 0.5), "kl"),
    "string": (lambda m: setattr(m, "name", "b"), "name"),
    "object": (lambda m: setattr(m, "layers", [1]), "layers"),
    "inner": (lambda m: setattr(m.body[1], "p", 0.2), "body.1.p"),
    "mode": (lambda m: m.body[1].eval(), "body.1.training"),
    "config": (lambda m: setattr(m.config, "width", 8), "config.width"),
    "buffer": (lambda m: setattr(m, "scale", torch.ones(())), "scale"),
    "module": (lambda m: m.body.__setitem__(1, nn.Identity()), "body.1"),
    "new attribute": (lambda m: setattr(m, "more", 1), "which attributes"),
    "new module": (lambda m: m.body.append(nn.Identity()), "which attributes"),
    "frozen": (lambda m: m.body[0].bias.requires_grad_(False), "of body.0.bias"),
    "parameter hook": (lambda m: m.body[0].weight.register_hook(nothing), "of body.0.weight"),
    "later hook": (
        lambda m: m.body[0].weight.register_post_accumulate_grad_hook(nothing),
        "of body.0.weight",
    ),
    "forward hook": (lambda m: m.body.register_forward_hook(nothing), "its hooks"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_seen_and_named(kind: str) -> None:
    change, name = CHANGES[kind]
    model = Model()
    seen = Circumstances(model)
    before = seen.look()
    assert seen.difference(before, seen.look()) is None
    change(model)
    assert name in str(seen.difference(before, seen.look()))


def test_values_of_tensors_and_steps_of_training_are_no_changes() -> None:
    model = Model()
    seen = Circumstances(model)
    before = seen.look()
    model.body(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        model.scale.fill_(3)
        model.body[0].weight.add_(1)
    assert seen.difference(before, seen.look()) is None


def test_what_a_pass_puts_in_place_is_its_own() -> None:
    model = Model()
    seen = Circumstances(model)
    before = seen.look()
    model.layers = [2]
    seen.passed(before)
    before = seen.look()
    model.layers = [3]
    assert seen.difference(before, seen.look()) is None
    model.kl = 0.5  # a number never is
    seen.passed(before)
    assert seen.difference(before, seen.look()) == "kl"


def test_numbers_that_moved_are_named_and_put_back() -> None:
    model = Model()
    seen = Circumstances(model)
    before = seen.numbers()
    model.layers = [2]  # as long as before
    assert seen.moved(before) is None
    model.kl, model.config.width = 0.5, 9
    assert seen.moved(before) == "kl"
    model.kl = 0.0
    model.layers.append(3)
    assert seen.moved(before) == "layers"
    model.layers.pop()
    seen.put_back(before)
    assert (model.kl, model.config.width, model.layers) == (0.0, 4, [2])


def test_another_look_around_finds_what_is_new() -> None:
    model = Model()
    seen = Circumstances(model)
    model.more = 1
    seen.find()
    before = seen.look()
    model.more = 2
    assert seen.difference(before, seen.look()) == "more"


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m.body.register_forward_hook(nothing),
        lambda m: m.body.register_forward_pre_hook(nothing),
        lambda m: m.body.register_full_backward_hook(nothing),
        lambda m: m.body.register_full_backward_pre_hook(nothing),
        lambda m: m.body[0].weight.register_hook(nothing),
        lambda m: m.body[0].weight.register_post_accumulate_grad_hook(nothing),
        lambda m: nn.modules.module.register_module_forward_hook(nothing),
    ],
    ids=["forward", "pre", "backward", "backward pre", "parameter", "later", "global"],
)
def test_hooks_of_every_kind(hook: Callable[[Any], Any]) -> None:
    model = Model()
    assert not has_hooks(model)
    handle = hook(model)
    try:
        assert has_hooks(model)
    finally:
        handle.remove()


def test_a_hook_that_can_be_recorded_is_none() -> None:
    def noise(*args: Any) -> None:
        pass

    noise.recordable = True  # type: ignore[attr-defined]
    model = Model()
    model.body.register_forward_hook(noise)
    assert not has_hooks(model)
