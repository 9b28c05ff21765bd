"""Callbacks find the gradients where the Hugging Face Trainer shows them, and may change them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.peer import assert_same_weights, both
from support.shell import make_trainer, scored, weights
from trainer import TrainerCallback

pytest.importorskip("transformers")

LIMIT = 0.01


class Gradients(TrainerCallback):
    """Notes every parameter's gradient before and after the optimizer's update."""

    def __init__(self) -> None:
        self.before: list[list[torch.Tensor]] = []
        self.after: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append([p.grad.clone() for p in kwargs["model"].parameters()])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append([p.grad.clone() for p in kwargs["model"].parameters()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert all(p.grad is None for p in kwargs["model"].parameters())


@pytest.mark.row(16, 115)
@pytest.mark.parametrize("limit", [0.0, LIMIT])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_gradients_are_shown_clipped_before_and_after_the_update(
    optim: str, limit: float, tmp_path: Path
) -> None:
    seen: list[Gradients] = []

    def act(trainer: Any) -> Any:
        seen.append(Gradients())
        trainer.add_callback(seen[-1])
        return trainer.train()

    both(
        tmp_path,
        scored("mlp"),
        act,
        optim=optim,
        max_grad_norm=limit,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
    )
    ours, theirs = seen
    for mine, given in ((ours.before, theirs.before), (ours.after, theirs.after)):
        assert len(mine) == len(given) == 3
        for one, other in zip(mine, given, strict=True):
            assert all(map(torch.equal, one, other))
    norms = [float(torch.stack([g.norm() for g in step]).norm()) for step in ours.before]
    assert (max(norms) <= LIMIT * 1.001) == bool(limit)


class Doubling(TrainerCallback):
    """Puts gradients of its own in place of those that were clipped, or changes them."""

    def __init__(self, *, in_place: bool) -> None:
        self.in_place = in_place

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if self.in_place:
                parameter.grad.mul_(2)
            else:
                parameter.grad = 2 * parameter.grad


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_that_a_callback_changes_are_those_applied(
    in_place: bool, tmp_path: Path
) -> None:
    def act(trainer: Any) -> Any:
        trainer.add_callback(Doubling(in_place=in_place))
        return trainer.train()

    ours, theirs = both(tmp_path, scored("mlp"), act, optim="sgd", max_grad_norm=LIMIT)
    assert_same_weights(ours, theirs)
    plain = make_trainer(tmp_path, scored("mlp"), optim="sgd", max_grad_norm=LIMIT)
    plain.train()
    assert any(not torch.equal(a, weights(plain)[n]) for n, a in weights(ours.trainer).items())


def test_an_optimizer_object_shows_them_too(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        """A class that nothing is known of, so that the object runs itself."""

        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    watching = Gradients()
    model = scored("mlp")
    trainer = make_trainer(
        tmp_path,
        model,
        callbacks=[watching],
        more={"optimizers": (Own(model.parameters(), lr=0.1), None)},
        max_steps=2,
    )
    trainer.train()
    assert len(watching.after) == 2
    assert all(map(torch.equal, watching.before[0], watching.after[0]))
