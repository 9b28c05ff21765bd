"""A clipping norm that is changed while training goes on."""

from pathlib import Path
from types import SimpleNamespace

import trainstep as ts
from support.shell import make_trainer
from trainer.clipping import Clipping
from trainer.engine import no_loss


def test_the_step_is_left_alone_until_the_norm_changes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=0.0)
    first = ts.make_step(no_loss, ts.optim.sgd(0.1))
    run = SimpleNamespace(step=first)
    clipping = Clipping(trainer, run)
    clipping()
    assert run.step is first

    trainer.args.max_grad_norm = 0.5
    clipping()
    assert [transform.name for transform in run.step.transforms] == ["clip_by_global_norm"]
    second = run.step
    clipping()
    assert run.step is second
    trainer.args.max_grad_norm = None
    clipping()
    assert run.step.transforms == ()


def test_recorded_steps_are_given_up(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=1.0)
    plain, reasons = ts.make_step(no_loss, ts.optim.sgd(0.1)), []

    def give_up(reason: str) -> None:
        reasons.append(reason)
        run.step = plain

    run = SimpleNamespace(step=object(), engine=SimpleNamespace(give_up=give_up))
    clipping = Clipping(trainer, run)
    trainer.args.max_grad_norm = 0.5
    clipping()
    clipping()
    assert reasons == ["args.max_grad_norm was changed to 0.5 during training"]
    assert len(run.step.transforms) == 1
