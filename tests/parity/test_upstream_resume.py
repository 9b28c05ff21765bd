"""One check, two trainers: more of what the Hugging Face Trainer 5.6.1 gets wrong about checkpoints.

As in ``test_upstream_defects``: the peer's cases are strict expected failures.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from support.peer import each
from support.shell import Stream, Watching, flat, logged, make_trainer, samples, scored, weights
from trainer import callbacks as our_callbacks
from trainer.checkpoint import list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")

Make = Callable[..., Any]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.row(188)
@each
def test_another_batch_size_goes_on_after_the_samples_that_were_seen(
    make: Make, tmp_path: Path
) -> None:
    """Saved after 4 of 12 samples, in batches of 2; then in batches of 4."""
    whole = make(tmp_path / "whole", scored("mlp", Watching), train=samples(12), **SAVING)
    whole.train()
    options = {"train": samples(12), "per_device_train_batch_size": 4, "num_train_epochs": 4}
    again = make(tmp_path / "again", scored("mlp", Watching), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert flat(again.model.seen)[:8] == flat(whole.model.seen)[4:]


@pytest.mark.row(191)
@each
def test_a_run_that_dies_while_it_saves_can_be_resumed(make: Make, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", scored("mlp"))
    whole.train()
    trainer = make(tmp_path / "run", scored("mlp"), **SAVING)
    save, saved = trainer.save_model, []

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        saved.append(1)
        if len(saved) == 3:
            raise Killed

    trainer.save_model = save_and_die
    with pytest.raises(Killed):
        trainer.train()
    again = make(tmp_path / "run", scored("mlp"), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), weights(whole))


@pytest.mark.row(198)
@each
def test_a_last_batch_of_a_stream_that_is_not_full_is_dropped(make: Make, tmp_path: Path) -> None:
    model = scored("mlp", Watching)
    options = {"train": Stream(samples(5)), "dataloader_drop_last": True, "max_steps": 4}
    make(tmp_path, model, **options).train()
    assert [len(batch) for batch in model.seen] == [2, 2, 2, 2]


class Counting(IterableDataset[Any]):
    """A stream with a state, which counts what is drawn from it."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.next, self.drawn = rows, 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.rows):
            self.next += 1
            self.drawn += 1
            yield self.rows[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@each
def test_a_stream_with_a_state_is_not_read_again(make: Make, tmp_path: Path) -> None:
    options = {"max_steps": 6, **SAVING}
    make(tmp_path / "whole", scored("mlp"), train=Counting(samples(12)), **options).train()
    stream = Counting(samples(12))
    again = make(tmp_path / "again", scored("mlp"), train=stream, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert stream.drawn == 4


@each
def test_the_learning_rate_given_now_is_used_or_refused_aloud(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("trainer", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    options = {"lr_scheduler_type": "constant", **SAVING}
    make(tmp_path / "whole", scored("mlp"), learning_rate=0.05, **options).train()
    caplog.clear()
    again = make(tmp_path / "again", scored("mlp"), learning_rate=0.01, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    told = any("learning_rate" in r.getMessage() for r in caplog.records if r.levelno >= 30)
    assert told or logged(again, "learning_rate")[2:] == [0.01] * 3


@pytest.mark.row(185)
@each
def test_resuming_a_finished_run_tells_its_loss(make: Make, tmp_path: Path) -> None:
    whole = make(tmp_path, scored("mlp"), **SAVING).train()
    again = make(tmp_path, scored("mlp"), **SAVING).train(resume_from_checkpoint=True)
    assert again.training_loss == pytest.approx(whole.training_loss, rel=1e-6)


class Remembering:
    """Has a state of its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def state(self) -> dict[str, Any]:
        return {"args": {"number": self.number}, "attributes": {}}


@each
def test_the_states_of_callbacks_do_not_pile_up(make: Make, tmp_path: Path) -> None:
    library: Any = our_callbacks
    if make is not make_trainer:
        library = pytest.importorskip("transformers.trainer_callback")
    bases = (Remembering, library.TrainerCallback, library.ExportableState)
    own = type("Remembering", bases, {})
    make(tmp_path, scored("mlp"), callbacks=[own(1), own(2)], **SAVING).train()
    text = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert len(text["stateful_callbacks"]["Remembering"]) == 2


@each
def test_rotation_goes_by_the_step_and_not_by_the_clock(make: Make, tmp_path: Path) -> None:
    make(tmp_path, scored("mlp"), max_steps=3, **SAVING).train()
    os.utime(tmp_path / "checkpoint-1", (2**32, 2**32))  # as a copy, a backup or `touch` may leave
    again = make(tmp_path, scored("mlp"), save_total_limit=2, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]


class Tied(nn.Module):
    """Two layers with one weight, in a module that is not one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()))


@each
def test_tied_weights_of_any_module_can_be_saved(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, scored(Tied), **SAVING)
    trainer.train()
    again = make(tmp_path, scored(Tied, seed=1), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(weights(again), weights(trainer))


@each
def test_no_file_of_a_checkpoint_is_a_pickle(make: Make, tmp_path: Path) -> None:
    make(tmp_path, scored("mlp"), **SAVING).train()
    files = [path for path in (tmp_path / "checkpoint-5").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path.name for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02")]
