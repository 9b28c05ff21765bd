"""What one process thinks the others have of a batch is what they have."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from attrs import define
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Sequential
from trainer.data.sampler import GlobalBatchSampler
from trainer.distributed import Ranks, Windows


@define
class Run:
    batch: int = 0


@define
class Args:
    gradient_accumulation_steps: int
    device: str = "cpu"


@define
class Trainer:
    args: Args
    _run: Run

    def get_batch_samples(self, batches: Iterator[Any], number: int, device: Any) -> Any:
        return list(islice(batches, number)), None


@define
class Loader:
    batch_sampler: GlobalBatchSampler


@given(
    n=st.integers(0, 40),
    rows=st.integers(1, 5),
    size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    drop_last=st.booleans(),
    begin=st.integers(0, 3),
)
def test_sizes_of_all_processes_are_known(
    n: int, rows: int, size: int, accumulation: int, drop_last: bool, begin: int
) -> None:
    samplers = [GlobalBatchSampler(Sequential(n), rows, size, r, drop_last) for r in range(size)]
    begin = min(begin, len(samplers[0]))
    seen: list[int] = []
    for sampler in samplers:
        sampler.set_position(0, begin)
    real = [[len(keys) for keys in sampler] for sampler in samplers]
    for rank, sampler in enumerate(samplers):
        trainer = Trainer(Args(accumulation), Run(begin))
        windows = Windows(trainer, Loader(sampler), Ranks(rank, size))
        batches = iter([keys or None for keys in sampler])
        while True:
            window, _ = windows(batches)
            if not window:
                break
            at = trainer._run.batch - begin
            expected = [list(each) for each in zip(*real, strict=True)][at : at + accumulation]
            if size > 1:
                assert windows.sizes == expected
                assert windows.even == all(len(set(each)) == 1 for each in expected)
            trainer._run.batch += len(window)
            if rank == 0:
                seen.append(sum(map(sum, expected)))
    assert sum(seen) == sum(map(sum, real))
    if not drop_last:
        assert sum(seen) == max(0, n - begin * rows * size)
