"""What is asked on the host about masks: answered in recordings as in rehearsals, and checked."""

from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support.recordings import pretend
from trainer import Trainer, TrainingArguments
from trainer.host_reads import HostReads, facts

transformers = pytest.importorskip("transformers")


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config)


def batch(hidden: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 8 - hidden :] = 0
    return {"input_ids": torch.arange(16).reshape(2, 8), "attention_mask": mask}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> HostReads:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    return HostReads(torch.device("cpu"))


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_recording_gets_the_answers_of_the_rehearsal(hidden: int, reads: HostReads) -> None:
    model = bert()
    with reads.rehearsed("a"):
        expected = model(**batch(hidden)).last_hidden_state
    with reads.recorded("a"):
        found = model(**batch(hidden)).last_hidden_state
    assert torch.equal(found, expected)
    reads.check()


@pytest.mark.parametrize(("rehearsed", "hidden"), [(0, 3), (3, 0)])
def test_an_answer_that_would_have_been_another_is_noticed(
    rehearsed: int, hidden: int, reads: HostReads
) -> None:
    model = bert()
    with reads.rehearsed("a"):
        model(**batch(rehearsed))
    with reads.recorded("a"):
        model(**batch(rehearsed))
    reads.check()
    with reads.recorded("a"):
        model(**batch(hidden))
    with pytest.raises(RuntimeError, match='capture="off"'):
        reads.check()


@pytest.mark.parametrize(("first", "second", "told"), [(1, 2, "more"), (2, 1, "less")])
def test_other_questions_than_in_the_rehearsal(
    first: int, second: int, told: str, reads: HostReads
) -> None:
    model = bert()

    def ask(times: int) -> None:
        for _ in range(times):
            model(**batch(0))

    with reads.rehearsed("a"):
        ask(first)
    with pytest.raises(ts.CaptureError, match=f"{told} is read on the host"), reads.recorded("a"):
        ask(second)


def test_other_code_asks_for_itself(reads: HostReads) -> None:
    with reads.rehearsed("a"):
        assert bool(torch.ones(()))
    with reads.recorded("a"):
        assert not bool(torch.zeros(()))
    reads.check()


class Masking(torch.nn.Module):
    """Makes its mask from the tokens, so that nothing in a batch tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = bert(), torch.nn.Linear(16, 2)

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        mask = input_ids.ne(0) if attention_mask is None else attention_mask
        outputs = self.body(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, 0]
        return {"loss": torch.nn.functional.cross_entropy(self.head(outputs), labels)}


def train(folder: Path, masks: bool, padded: tuple[int, ...], **options: Any) -> Trainer:
    samples = []
    for number in range(16):
        sample = {"input_ids": torch.arange(1, 9), "labels": torch.tensor(number % 2)}
        if number in padded:
            sample["input_ids"] = torch.tensor([1, 2, 3, 4, 0, 0, 0, 0])
        if masks:
            sample["attention_mask"] = sample["input_ids"].ne(0)
        samples.append(sample)
    options = {"num_train_epochs": 2, **options}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(Masking(), arguments, train_dataset=samples)
    trainer.train()
    return trainer


def test_batches_with_and_without_hidden_tokens_are_recorded_apart(
    reads: HostReads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = pretend(monkeypatch)
    mine = train(tmp_path / "a", True, (4, 5, 7, 8, 13))
    assert told.recordings == 2
    assert mine.lowering == "eager, recorded in CUDA graphs"
    plain = train(tmp_path / "b", True, (4, 5, 7, 8, 13), capture="off")
    assert ts.diff(mine.train_state, plain.train_state) == []


def test_masks_that_nobody_asks_about_do_not_matter(
    reads: HostReads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = pretend(monkeypatch)

    def forward(self: Any, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        hidden = self.body.embeddings(input_ids=input_ids)[:, 0]
        return {"loss": torch.nn.functional.cross_entropy(self.head(hidden), labels)}

    monkeypatch.setattr(Masking, "forward", forward)
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 10}
    mine = train(tmp_path / "a", True, (1, 2, 7, 8, 13), **options)
    assert told.recordings == 1
    plain = train(tmp_path / "b", True, (1, 2, 7, 8, 13), capture="off", **options)
    assert ts.diff(mine.train_state, plain.train_state) == []


@pytest.mark.parametrize("option", [{"logging_steps": 8}, {"logging_strategy": "no"}])
def test_a_mask_that_nobody_could_know_of_ends_training(
    option: dict[str, Any], reads: HostReads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    train(tmp_path, False, (), **option)
    with pytest.raises(RuntimeError, match="for another mask than the batches had"):
        train(tmp_path, False, (14,), **option)


def test_what_is_known_of_a_batch() -> None:
    assert facts(batch(0)) == ("attention_mask hides nothing",)
    assert facts(batch(1)) == ("attention_mask hides something",)
    assert facts({"x": torch.ones(2)}) == ()
    assert facts({**batch(0), "position_ids": torch.arange(8)}) is None
    assert facts({"attention_mask": [1]}) is None
    assert facts([torch.ones(2)]) is None
    assert facts({"attention_mask": torch.ones(2, device="meta")}) is None
