"""One process has nobody to ask; what several would share is cut alike everywhere."""

from pathlib import Path

import pytest
import torch
from attrs import define

from support.shell import make_args, make_trainer, samples, scored
from trainer.distributed import Ranks, agree, ranks_of
from trainer.distributed.ddp import DDPEngine
from trainer.distributed.engines import make_engine, sums_losses_later
from trainer.distributed.ranks import rows_of_rank
from trainer.distributed.reduce import buckets
from trainer.engine import LocalEngine
from trainer.meter import Meter

ONE = Ranks()


def test_a_process_alone_agrees_with_itself(tmp_path: Path) -> None:
    ranks = ranks_of(make_args(tmp_path))
    assert (ranks.rank, ranks.size, ranks.many, ranks.first) == (0, 1, False, True)
    assert agree.gather(ranks, "x") == ["x"]
    assert agree.from_first(ranks, 3) == 3
    assert agree.any_of(ranks, [True, False]) == [True, False]
    assert agree.gather_numbers(ranks, [1, 2]) == [[1, 2]]
    assert agree.total(ranks, 0.1) == 0.1
    with pytest.raises(KeyError, match="own"):
        agree.together(ranks, "nothing", lambda: {}["own"], ValueError)


@define
class Config:
    split_batches: bool = True


@define
class Args:
    world_size: int
    accelerator_config: Config


def test_a_batch_is_split_only_if_that_is_asked_for() -> None:
    assert rows_of_rank(Args(4, Config()), 8) == 2
    assert rows_of_rank(Args(4, Config(False)), 8) == 8
    assert rows_of_rank(Args(1, Config()), 7) == 7
    with pytest.raises(ValueError, match=r"each batch of 6 among 4 processes.*a multiple of 4"):
        rows_of_rank(Args(4, Config()), 6)


def test_buckets_hold_one_kind_of_tensor_up_to_a_size() -> None:
    tensors = [torch.zeros(n, dtype=d) for n in (3, 1, 5) for d in (torch.float32, torch.int64)]
    sizes = [[t.numel() for t in bucket] for bucket in buckets(tensors, limit=16)]
    assert sizes == [[3, 1], [5], [3], [1], [5]]
    kinds = [{t.dtype for t in bucket} for bucket in buckets(tensors, limit=16)]
    assert all(len(kind) == 1 for kind in kinds)


def test_losses_of_processes_are_added_when_they_are_read() -> None:
    calls: list[int] = []

    def join(numbers: object) -> object:
        calls.append(len(numbers))  # type: ignore[arg-type]
        return numbers * 2  # type: ignore[operator]

    meter = Meter(filter_nonfinite=True, join=join)
    for loss in (1.0, 2.5):
        meter.add({"loss": torch.tensor(loss), "grad_norm": torch.ones(()), "lr": torch.ones(())})
    assert not calls
    assert meter.read(2) == 3.5
    assert calls == [2]


def test_one_process_keeps_the_local_engine(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"), train=samples(2))
    trainer.train()
    engine = make_engine(trainer, trainer.train_state, None, ONE)  # type: ignore[arg-type]
    assert type(engine) is LocalEngine
    assert not sums_losses_later(trainer.args, ONE)
    two = Ranks(size=2)
    assert type(make_engine(trainer, trainer.train_state, None, two)) is DDPEngine  # type: ignore[arg-type]
    for changes, later in (({}, True), ({"on_nonfinite": "skip"}, False), ({"fp16": True}, False)):
        assert sums_losses_later(make_args(tmp_path, **changes), two) == later
