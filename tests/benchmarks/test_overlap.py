"""Interval arithmetic of the profiles in ``benchmarks/multi_gpu.py``."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from multi import overlap


def event(name: str, begin: float, end: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin}


def test_unions_join_what_touches_and_leave_out_what_is_empty() -> None:
    assert overlap.merged([(5, 7), (0, 2), (2, 3), (1, 2), (9, 9)]) == [(0, 3), (5, 7)]
    assert overlap.length([(0, 2), (1, 4), (10, 11)]) == 5
    assert overlap.merged([]) == []


def test_shared_time_is_what_counting_gives() -> None:
    draws = random.Random(0)
    for _ in range(200):
        sides = [
            [(a, a + draws.randrange(6)) for a in draws.choices(range(40), k=draws.randrange(8))]
            for _ in range(2)
        ]
        seen = [{t for begin, end in side for t in range(begin, end)} for side in sides]
        assert overlap.shared(*sides) == len(seen[0] & seen[1])
        assert overlap.length(sides[0]) == len(seen[0])


def test_kernels_of_nccl_are_communication_hidden_where_others_run() -> None:
    found = overlap.overlap(
        [
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 20),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 18, 30),
            event("sm90_xmma_gemm", 5, 14),
            event("sm90_xmma_gemm", 12, 16),
            event("elementwise", 25, 26),
            event("nccl:all_reduce", 0, 90, "gpu_user_annotation"),
            event("aten::mm", 0, 100, "cpu_op"),
            {"ph": "i", "cat": "kernel", "name": "mark", "ts": 500},
        ]
    )
    assert found == {
        "communication": 20,
        "computation": 12,
        "hidden": 7,
        "span": 25,
        "share": pytest.approx(0.35),
    }


def test_without_kernels_operators_count() -> None:
    found = overlap.overlap(
        [
            event("gloo:all_reduce", 0, 4, "user_annotation"),
            event("aten::mm", 3, 9, "cpu_op"),
            event("c10d::allreduce_", 0, 1, "cpu_op"),
        ]
    )
    assert (found["communication"], found["hidden"], found["share"]) == (4, 1, 0.25)


def test_without_communication_there_is_no_share() -> None:
    assert overlap.overlap([event("gemm", 0, 1)])["share"] is None
    assert overlap.overlap([])["span"] == 0


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_traces_are_read_compressed_or_not(name: str, tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": [event("gemm", 0, 1)]})
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert overlap.read(path) == [event("gemm", 0, 1)]
