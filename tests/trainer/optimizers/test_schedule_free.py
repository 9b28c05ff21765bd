"""Schedule-free optimizers train with other weights than they evaluate and save with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainstep as ts
from support.shell import At, make_trainer, scored, weights
from trainer import Trainer

schedulefree = pytest.importorskip("schedulefree")


class Recording(Trainer):
    """Notes the weights in the first batch of each evaluation, and before each training step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.evaluated: dict[int, dict[str, Tensor]] = {}
        self.trained: dict[int, dict[str, Tensor]] = {}

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        self.evaluated.setdefault(self.state.global_step, weights(self))
        return super().prediction_step(*arguments, **options)

    def training_step(self, *arguments: Any) -> Tensor:
        self.trained[self.state.global_step] = weights(self)
        return super().training_step(*arguments)


def build(folder: Path, **changes: Any) -> Any:
    settings = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "max_steps": 6}
    return make_trainer(folder, scored("mlp"), make=Recording, **(settings | changes))


def evaluating(folder: Path, **changes: Any) -> Any:
    return build(folder, eval_strategy="steps", eval_steps=2, **changes)


@pytest.mark.row(34)
def test_evaluation_uses_the_average_and_leaves_training_alone(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain")
    plain.train()
    trainer = evaluating(tmp_path / "evaluating", eval_on_start=True)
    trainer.train()

    assert trainer.evaluated.keys() == {0, 2, 4, 6}
    for step in (2, 4):
        assert not ts.equal(trainer.evaluated[step], trainer.trained[step])
    assert ts.equal(trainer.trained, plain.trained)
    assert ts.equal(trainer.train_state, plain.train_state)


def test_the_average_is_the_library_s(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path, max_grad_norm=0)
    batches = list(trainer.get_train_dataloader())
    model = scored("mlp")
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()

    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05, weight_decay=0.0)
    optimizer.train()
    for batch in batches[:2]:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    assert ts.equal(trainer.evaluated[2], {n: t.detach() for n, t in model.state_dict().items()})


@pytest.mark.row(34)
@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_hold_the_weights_that_were_evaluated(background: bool, tmp_path: Path) -> None:
    trainer = evaluating(tmp_path, save_strategy="steps", save_steps=2, async_save=background)
    trainer.train()
    for step in (2, 4, 6):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert ts.equal(saved, trainer.evaluated[step])


def test_checkpoints_without_evaluation_hold_them_too(tmp_path: Path) -> None:
    evaluated = evaluating(tmp_path / "a")
    evaluated.train()
    build(tmp_path / "b", save_strategy="steps", save_steps=4).train()
    saved = load_file(tmp_path / "b" / "checkpoint-4" / "model.safetensors")
    assert ts.equal(saved, evaluated.evaluated[4])


def test_after_training_the_model_is_the_one_to_use(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path)
    trainer.train()
    assert ts.equal(weights(trainer), trainer.evaluated[6])
    assert ts.equal(trainer.train_state.params, dict(trainer.model.named_parameters()))
    trainer.save_model(str(tmp_path / "model"))
    assert ts.equal(load_file(tmp_path / "model" / "model.safetensors"), weights(trainer))
    trainer.evaluate()
    assert ts.equal(weights(trainer), trainer.evaluated[6])


def test_a_second_training_goes_on_from_the_training_weights(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    last: list[dict[str, Tensor]] = []
    trainer.add_callback(At("step_end", 6, lambda control: last.append(weights(trainer))))
    trainer.train()
    trainer.train()

    # That of the second training; switching there and back rounds.
    torch.testing.assert_close(trainer.trained[0], last[0], rtol=1e-5, atol=1e-6)


def test_resuming_after_an_evaluation_is_exact(tmp_path: Path) -> None:
    whole = evaluating(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = evaluating(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert ts.equal(resumed.trained[5], whole.trained[5])
    assert ts.digest(resumed.train_state) == ts.digest(whole.train_state)


def test_the_best_model_is_loaded_as_it_was_evaluated(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path, save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert ts.equal(weights(trainer), trainer.evaluated[trainer.state.best_global_step])
