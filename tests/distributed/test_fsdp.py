"""Sharded training (``fsdp``) with 2 and 4 processes: what one process does with the joined batch."""

import json
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

from support.ranks.launch import launch
from support.ranks.sharded import CASES, evaluated, trained


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    found: dict[str, Any] = {"trained": trained(folder), "evaluated": evaluated(folder)}
    return dict(json.loads(json.dumps(found)))


@pytest.mark.row(147, 148, 149, 150, 153, 154)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_do_what_one_does_with_the_joined_batch(
    count: int, one: dict[str, Any], tmp_path: Path
) -> None:
    for found in launch(count, "sharded", tmp_path, "trained,evaluated,held").found:
        assert found["trained"].keys() == CASES.keys()
        for case, expected in one["trained"].items():
            ours = found["trained"][case]
            assert ours["steps"] == expected["steps"]
            for what in ("weights", "loss", "norm"):
                # The rounding of float32 sums: 2e-6 of the largest number.
                bound = 2e-6 * max(map(abs, expected[what]))
                where = f"{count} processes, {case}, {what}"
                assert_allclose(ours[what], expected[what], rtol=0, atol=bound, err_msg=where)
        for what, values in one["evaluated"].items():
            ours = found["evaluated"][what]
            if what.startswith("predictions"):
                assert_allclose(ours, values, rtol=0, atol=1e-6, err_msg=what)
            else:
                for mine, other in zip(ours, values, strict=True):
                    assert mine == pytest.approx(other, abs=1e-6), what
        # Rows are distributed whole: of 6 rows, one of 4 processes has 2.
        assert found["held"]["share"] < 1.5 / count
        assert len(set(found["held"]["digests"])) == 1
        sizes = [2] if count == 2 else [2, 2]
        assert found["held"]["meshes"] == {"hybrid": [count // 2, 2], "sizes": sizes}
        assert found["held"]["runs"] == {"layers": 1, "checkpointed": 2}


def test_what_sharded_training_refuses_and_a_disk_that_fails_one_process(tmp_path: Path) -> None:
    for found in launch(2, "sharded", tmp_path, "refusals").found:
        told = found["refusals"]
        assert "exact_reduction adds up whole gradients in a fixed tree" in told["exact"]
        assert "transformer_layer_cls_to_wrap names Nothing" in told["layers"]
        assert "it has Block" in told["layers"]
        assert "Leave optimizers out" in told["optimizers"]
        left, last = told["disk"]
        assert left == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
        assert "it was not saved. process 1: " in last
        assert "Free some space" in last
