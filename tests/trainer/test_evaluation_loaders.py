"""Evaluation loaders that are kept, and samplers that subclasses supply."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from support.shell import (
    At,
    Killed,
    Stream,
    Watching,
    flat,
    kill,
    make_trainer,
    outcome,
    samples,
    scored,
)
from trainer import Trainer

KEPT = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}


def test_loaders_are_kept_by_name_if_workers_are_to_persist(tmp_path: Path) -> None:
    sets = {"a": samples(3), "b": samples(5)}
    trainer = make_trainer(tmp_path, evaluation=sets, **KEPT)
    first = trainer.get_eval_dataloader("a")

    assert first.persistent_workers
    assert trainer.get_eval_dataloader("a") is first
    assert trainer.get_eval_dataloader("b") is not first
    assert trainer.get_eval_dataloader("a") is first
    plain = make_trainer(tmp_path, evaluation=sets)
    assert plain.get_eval_dataloader("a") is not plain.get_eval_dataloader("a")


@pytest.mark.row(203)
def test_another_dataset_is_evaluated_and_not_the_one_before(tmp_path: Path) -> None:
    data, other = samples(5, seed=1), samples(5, seed=2)
    trainer = make_trainer(tmp_path, evaluation=data, **KEPT)
    losses = [trainer.evaluate(d)["eval_loss"] for d in (None, other, None)]

    wanted = [make_trainer(tmp_path, evaluation=d).evaluate()["eval_loss"] for d in (data, other)]
    assert losses == [*wanted, wanted[0]]
    loader = trainer.get_eval_dataloader()
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.get_eval_dataloader() is not loader
    trainer.eval_dataset = other
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted[1])


def test_workers_go_on_and_do_not_pile_up(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **KEPT)
    before = set(multiprocessing.active_children())

    def workers() -> set[Any]:
        return set(multiprocessing.active_children()) - before

    trainer.evaluate()
    first = workers()
    assert len(first) == 1
    trainer.evaluate()
    assert workers() == first
    for seed in range(4):
        trainer.evaluate(samples(5, seed=seed))
    assert len(workers()) == 1
    assert not workers() & first


class Chosen(Trainer):
    """Trains on a weighted choice and evaluates backwards, as older scripts define it."""

    def _get_train_sampler(self) -> Sampler[int]:  # type: ignore[override]
        return WeightedRandomSampler([0.0] * 5 + [1.0] * 5, 10)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return range(len(eval_dataset))[::-1]


def test_samplers_of_a_subclass_are_used(tmp_path: Path) -> None:
    model = scored("mlp", Watching)
    trainer = make_trainer(tmp_path, model, make=Chosen, num_train_epochs=2)
    trainer.train()
    rows = [float(row["x"][0]) for row in samples()]
    assert len(flat(model.seen)) == 20
    assert set(flat(model.seen)) <= set(rows[5:])
    assert flat(model.seen)[:10] != flat(model.seen)[10:]

    data = samples(5)
    forwards = make_trainer(tmp_path, model).predict(data).label_ids
    assert trainer.predict(data).label_ids.tolist() == forwards[::-1].tolist()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(
        make_trainer(tmp_path, model).evaluate(data)["eval_loss"]
    )


class Private(Trainer):
    """Its sampler has a generator of its own, whose state is nowhere saved."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(5)
        return RandomSampler(train_dataset, generator=generator)


class Noisy(list[Any]):
    """Samples with noise from the global generator."""

    deterministic = False

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        return {**row, "x": row["x"] + torch.randn(4)}


@pytest.mark.parametrize("make", [Chosen, Private])
@pytest.mark.parametrize("step", [3, 8])
def test_a_run_with_a_foreign_sampler_resumes_exactly(make: Any, step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": step}

    def build(name: str, **more: Any) -> Any:
        torch.manual_seed(len(name))
        return make_trainer(
            tmp_path / name, scored(), train=Noisy(samples()), make=make, **settings, **more
        )

    whole = build("whole")
    wanted = outcome(whole, whole.train())
    torn = build("torn", callbacks=[At("step_begin", step, kill)])
    with pytest.raises(Killed):
        torn.train()
    again = build("torn")
    assert outcome(again, again.train(resume_from_checkpoint=True)) == wanted


def test_the_usual_samplers_can_be_asked_for(tmp_path: Path) -> None:
    class Sometimes(Trainer):
        asked: list[Any] = []  # noqa: RUF012

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            self.asked.append(train_dataset)
            return super()._get_train_sampler(train_dataset)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return SequentialSampler(eval_dataset)

    trainer = make_trainer(tmp_path, make=Sometimes)
    usual = make_trainer(tmp_path)
    assert list(trainer._get_train_sampler()) == list(usual._get_train_sampler())
    assert sorted(usual._get_train_sampler()) == list(range(10))
    assert list(usual._get_eval_sampler(samples(3))) == [0, 1, 2]
    assert (usual._get_train_sampler(Stream([])), usual._get_eval_sampler(None)) == (None, None)
    trainer.train()
    usual.train()
    assert trainer.state.log_history[0]["loss"] == usual.state.log_history[0]["loss"]
    assert trainer.asked[-1] is trainer.train_dataset
    assert trainer.evaluate()["eval_loss"] == usual.evaluate()["eval_loss"]


def test_no_sampler_means_the_order_of_the_data(tmp_path: Path) -> None:
    class Plain(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> None:
            return None

    model = scored("mlp", Watching)
    make_trainer(tmp_path, model, make=Plain).train()
    assert flat(model.seen) == [float(row["x"][0]) for row in samples()]


def test_samplers_are_not_asked_for_data_without_length(tmp_path: Path) -> None:
    class Refusing(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            raise AssertionError

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            raise AssertionError

    trainer = make_trainer(
        tmp_path, make=Refusing, train=Stream(samples()), evaluation=Stream(samples(3)), max_steps=2
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"]


class Unsized(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        class Endless(Sampler[int]):
            def __iter__(self) -> Iterator[int]:
                yield 0

        return Endless()


def test_a_sampler_without_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Sampler with a __len__, got Endless"):
        make_trainer(tmp_path, make=Unsized).train()
