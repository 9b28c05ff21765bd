"""``Trainer``: the pure step underneath, training twice, records, evaluation on the way."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support import models
from support.shell import (
    At,
    Normed,
    Scored,
    logged,
    make_args,
    make_trainer,
    samples,
    scored,
    scripted,
    weights,
)
from trainer import EarlyStoppingCallback, Trainer

# ---- equal to the pure step


def by_hand(trainer: Trainer, model: nn.Module, micro: int, epochs: int) -> tuple[Any, list[float]]:
    """Train ``model`` with the core alone, on the order and key that the trainer would use."""
    args = trainer.args
    decayed = {"body.first.weight", "body.last.weight"}
    step = ts.donate(
        ts.make_step(
            ts.module_loss(model, lambda call, batch: call(**batch)["loss"]),
            ts.optim.partition(
                lambda name: "group0" if name in decayed else "group1",
                {
                    "group0": ts.optim.adamw(weight_decay=0.1, fused=True),
                    "group1": ts.optim.adamw(weight_decay=0.0, fused=True),
                },
            ),
            schedule=ts.schedules.linear(args.learning_rate, trainer.state.max_steps, 2),
            transforms=(ts.transforms.clip_by_global_norm(0.5),),
            microbatches="iter",
        )
    )
    rows = samples()
    state, losses = step.init(model, seed=args.seed), []
    for epoch in range(epochs):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(args.seed + epoch))
        batches = [
            {key: torch.stack([rows[int(i)][key] for i in part]) for key in ("x", "labels")}
            for part in order.split(2)
        ]
        for start in range(0, len(batches), micro):
            state, metrics = step(state, batches[start : start + micro])
            losses.append(metrics["loss"].item())
    return state, losses


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_training_has_the_bits_of_the_pure_step(micro: int, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        scored(lambda: Normed(0.3)),
        gradient_accumulation_steps=micro,
        num_train_epochs=3,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=0.5,
        seed=5,
    )
    trainer.train()
    state, losses = by_hand(trainer, scored(lambda: Normed(0.3)), micro, 3)

    assert logged(trainer, "loss") == losses
    assert ts.digest(trainer.train_state) == ts.digest(state)


@pytest.mark.row(93)
def test_dropout_depends_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    def losses(seed: int, noise: int) -> list[float]:
        trainer = make_trainer(
            tmp_path, scored("dropout"), seed=seed, data_seed=1, num_train_epochs=2
        )
        torch.manual_seed(noise)
        trainer.train()
        return logged(trainer, "loss")

    assert losses(1, 0) == losses(1, 3) != losses(2, 0)


def test_the_state_is_the_models_own_memory(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("batch_norm"))
    parameter = next(trainer.model.parameters())
    assert trainer.train_state.step == 0
    seen: list[Any] = []
    trainer.add_callback(At("step_end", 2, lambda control: seen.append(trainer.train_state.step)))
    trainer.train()

    assert seen == [2]
    assert next(trainer.model.parameters()) is parameter
    for name, tensor in {**trainer.train_state.params, **trainer.train_state.buffers}.items():
        assert tensor.data_ptr() == trainer.model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("mode", ["ignore", "skip", "raise"])
def test_updates_that_are_not_finite(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = samples()
    data[3]["labels"] = torch.full((2,), math.nan)
    trainer = make_trainer(tmp_path, train=data, on_nonfinite=mode)
    if mode == "raise":
        with pytest.raises(FloatingPointError):
            trainer.train()
        return
    trainer.train()
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert finite == (mode == "skip")
    assert "had a loss or gradient that is not finite" in caplog.text
    if mode == "skip":
        assert int(trainer.train_state.extras["skipped"]) == 1
        name, parameter = next(iter(trainer.model.named_parameters()))
        assert trainer.train_state.params[name].data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("name", ["batch_norm", "counting"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_skipped_update_leaves_no_trace_in_the_buffers(
    name: str, bad: int, tmp_path: Path
) -> None:
    """The run with the bad batch ends as one that never had it, but for the count of steps."""
    settings: dict[str, Any] = {
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "on_nonfinite": "skip",
    }
    data = samples()
    for row in data[2 * bad : 2 * bad + 2]:
        row["x"] = torch.full((4,), math.nan)
    trainer = make_trainer(tmp_path / "a", scored(name), train=data, **settings)
    trainer.train()
    clean = make_trainer(
        tmp_path / "b", scored(name), train=data[: 2 * bad] + data[2 * bad + 2 :], **settings
    )
    clean.train()

    trainer._sync_buffers()
    assert int(trainer.train_state.extras["skipped"]) == 1
    for key, tensor in weights(clean).items():
        assert torch.equal(weights(trainer)[key], tensor), key
    for key, tensor in trainer.train_state.buffers.items():
        assert torch.equal(trainer.model.get_buffer(key), tensor), key
    assert trainer.evaluate()["eval_loss"] == clean.evaluate()["eval_loss"]


# ---- training again


def test_a_second_training_goes_on_with_the_moments_and_starts_the_schedule_anew(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"))
    first = trainer.train()
    before, moments = weights(trainer), ts.digest(trainer.train_state.opt_state)
    started: list[str] = []
    trainer.add_callback(
        At("train_begin", 0, lambda c: started.append(ts.digest(trainer.train_state.opt_state)))
    )
    second = trainer.train()

    assert (first.global_step, second.global_step) == (5, 5)
    assert started == [moments]
    assert logged(trainer, "learning_rate") == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])
    assert [record["step"] for record in trainer.state.log_history] == [1, 2, 3, 4, 5, 5]
    assert any(not torch.equal(before[n], w) for n, w in weights(trainer).items())


@pytest.mark.row(7)
def test_model_init_makes_a_fresh_model_for_every_training(tmp_path: Path) -> None:
    made: list[Scored] = []

    def init() -> Scored:
        made.append(Scored(models.MODELS["dropout"]()))
        return made[-1]

    trainer = Trainer(
        args=make_args(tmp_path), model_init=init, train_dataset=samples(), eval_dataset=samples(2)
    )
    histories, digests = [], []
    for _ in range(2):
        trainer.train()
        histories.append(logged(trainer, "loss"))
        digests.append(ts.digest(trainer.train_state))

    assert len(made) == 3
    assert trainer.model is trainer.callback_handler.model is made[-1]
    assert histories[0] == histories[1]
    assert digests[0] == digests[1]


def test_results_do_not_depend_on_whether_the_state_was_looked_at(tmp_path: Path) -> None:
    a, b = (make_trainer(tmp_path, scored("batch_norm")) for _ in range(2))
    assert a.train_state.step == 0
    a.evaluate()
    for trainer in (a, b):
        trainer.train()

    assert ts.digest(a.train_state) == ts.digest(b.train_state)


# ---- records


@pytest.mark.row(6, 98, 201)
@pytest.mark.parametrize("quiet", [True, False])
def test_the_records_have_their_keys(quiet: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        disable_tqdm=quiet,
        eval_strategy="epoch",
        logging_steps=2,
        logging_first_step=True,
    )
    result = trainer.train()
    history = trainer.state.log_history

    assert [r["step"] for r in history] == [1, 2, 4, 5, 5]
    assert list(history[0]) == ["loss", "grad_norm", "learning_rate", "epoch", "step"]
    speed = ["runtime", "samples_per_second", "steps_per_second"]
    assert list(history[-2]) == ["eval_loss", *(f"eval_{k}" for k in speed), "epoch", "step"]
    assert list(history[-1]) == [
        *(f"train_{k}" for k in speed),
        *("total_flos", "train_loss", "epoch", "step"),
    ]
    assert {**result.metrics, "step": 5} == history[-1]
    assert result.training_loss == history[-1]["train_loss"]


def test_losses_are_means_since_the_last_record(tmp_path: Path) -> None:
    fine, coarse = (
        make_trainer(tmp_path, scored(), logging_steps=steps, num_train_epochs=2)
        for steps in (1, 4)
    )
    each, means = fine.train(), coarse.train()
    losses = logged(fine, "loss")

    assert logged(coarse, "loss") == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:8]) / 4])
    assert (
        means.training_loss == pytest.approx(each.training_loss) == pytest.approx(sum(losses) / 10)
    )


@pytest.mark.row(91, 107)
def test_results_and_state_are_written_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()

    assert "***** train metrics *****" in capsys.readouterr().out
    assert json.loads((tmp_path / "all_results.json").read_text()) == metrics
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["log_history"] == trainer.state.log_history


# ---- evaluation during training


@pytest.mark.row(77)
def test_evaluation_begins_before_training_if_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_on_start=True)
    trainer.train()

    first = trainer.state.log_history[0]
    assert (first["step"], first["epoch"]) == (0, 0)
    assert "eval_loss" in first
    plain = make_trainer(tmp_path)
    plain.train()
    assert logged(trainer, "loss") == logged(plain, "loss")


@pytest.mark.row(75, 76)
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3}, [3, 4, 5, 6, 7, 8, 9, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 1.5}, [10]),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, [3, 6, 9, 10]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 10]),
        ({"eval_strategy": "epoch"}, [5, 10]),
        ({"eval_strategy": "no"}, []),
    ],
)
def test_evaluations_are_when_they_should(
    changes: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=2, **changes)
    trainer.train()

    assert [r["step"] for r in trainer.state.log_history if "eval_loss" in r] == steps


def test_training_goes_on_in_training_mode_after_an_evaluation(tmp_path: Path) -> None:
    plain, evaluating = (
        make_trainer(tmp_path, scored("dropout"), eval_strategy=when, eval_steps=1)
        for when in ("no", "steps")
    )
    plain.train()
    evaluating.train()

    assert logged(plain, "loss") == logged(evaluating, "loss")
    assert ts.digest(plain.train_state) == ts.digest(evaluating.train_state)


def test_a_missing_best_metric_lists_those_there_are(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="accuracy"
    )
    with pytest.raises(
        KeyError,
        match=r"metric_for_best_model='accuracy'.*no eval_accuracy; it gave eval_loss, eval_r",
    ):
        trainer.train()
    assert not trainer.is_in_train


@pytest.mark.row(118)
def test_early_stopping(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(2)],
        more={"compute_metrics": scripted([0.5, 0.6, 0.55, 0.54, 0.9])},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="score",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    assert trainer.train().global_step == 4
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 2)
