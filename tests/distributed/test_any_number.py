"""One, two and four processes with the same global batch: the same training, the same evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

import trainstep as ts
from support.full import FULL
from support.ranks.launch import launch
from support.ranks.launched import long
from support.ranks.same import everything


@pytest.mark.row(15, 60, 61, 74, 78, 139, 180, 183, 184, 194)
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    first = launch(2, "same", tmp_path / "two", "all").found
    alone = everything(tmp_path / "one", [tmp_path / "two" / "saved"])
    alone = json.loads(json.dumps(alone))
    saved = [str(tmp_path / name / "saved") for name in ("one", "two")]
    four = launch(4, "same", tmp_path / "four", "all", *saved).found
    back = [str(tmp_path / name / "saved") for name in ("one", "four")]
    again = launch(2, "same", tmp_path / "again", "resume", *back).found

    for name, processes in (("two", first), ("four", four)):
        for found in processes:
            assert found["exactly"] == alone["exactly"], name
            assert found["evaluated"] == alone["evaluated"], name
            assert found["saved"] == alone["saved"], name
            assert_joint(found["jointly"], alone["jointly"])
    digests = [alone["resumed"], *(found["resumed"] for found in four), *again]
    assert all(digest == alone["saved"] for found in digests for digest in found.values()), digests
    assert len(alone["resumed"]) == 2
    assert len(four[0]["resumed"]) == len(again[0]) == 4
    written = {path.name for path in (tmp_path / "four" / "saved" / "checkpoint-4").glob("host_*")}
    assert written == {f"host_rng-{rank}.json" for rank in range(4)}


@pytest.mark.skipif(not FULL, reason="8 processes take minutes on 2 cores: make test-full")
def test_eight_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    alone = long(tmp_path / "alone", 1)
    alone.train()
    assert alone.state.global_step == 40
    for found in launch(8, "launched", tmp_path / "eight", "long", limit=600).found:
        assert found["digest"] == ts.digest(alone.train_state)


def assert_joint(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that runs agree to the rounding of float32 sums: 2e-6 of the largest number."""
    assert found.keys() == expected.keys()
    for case, values in expected.items():
        for what, value in values.items():
            ours = found[case][what]
            if what in ("weights", "loss", "norm"):
                assert len(ours) == len(value)
                largest = max(map(abs, value))
                assert_allclose(ours, value, rtol=0, atol=2e-6 * largest, err_msg=f"{case} {what}")
            else:
                assert ours == pytest.approx(value), (case, what)
