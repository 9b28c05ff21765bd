"""``benchmarks/multi_gpu.py``: its dry run, and its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from multi import contest, parts, report, sides

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "multi_gpu.py"


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT / "src"), "NCCL_NVLS_ENABLE": "2", "NCCL_P2P_LEVEL": "NVL"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and text of a dry run; one for all tests, since it starts two dozen processes."""
    folder = tmp_path_factory.mktemp("dry")
    done = start("--dry", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "multi_gpu.json").read_text())
    return results, (folder / "multi_gpu.md").read_text()


@pytest.mark.slow
def test_every_part_runs_dry(dry: tuple[dict[str, Any], str]) -> None:
    results, text = dry
    assert [*results["parts"], *parts.LARGER] == sorted(
        parts.PARTS, key=lambda name: (name in parts.LARGER, list(parts.PARTS).index(name))
    )
    for name, found in results["parts"].items():
        assert found["error"] is None, name
        assert f"## {name}" in text
    assert "the figures mean nothing" in text


@pytest.mark.slow
def test_settings_of_nccl_are_kept_and_multicast_is_off(dry: tuple[dict[str, Any], str]) -> None:
    told = dry[0]["parts"]["about"]["result"]["environment"]
    assert told["NCCL_NVLS_ENABLE"] == "2"  # said by the environment
    assert told["NCCL_P2P_LEVEL"] == "NVL"
    assert told["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


@pytest.mark.slow
def test_sides_are_timed_and_profiled(dry: tuple[dict[str, Any], str]) -> None:
    found = dry[0]["parts"]["throughput 124M"]["result"]
    assert found["missing"] == {}
    assert all(len(times) == 1 and times[0] > 0 for times in found["times"].values())
    for key, facts in found["facts"].items():
        side = sides.SIDES[key]
        assert facts["world"] == (1 if key in contest.ONE else 2)
        assert ("overlap" in facts) == side.profiled
        if side.profiled:
            assert facts["overlap"]["communication"] > 0
            assert facts["overlap"]["computation"] > 0
    captured = dry[0]["parts"]["capture"]["result"]["contests"]
    assert captured[0]["times"].keys() == {"captured"}


@pytest.mark.slow
def test_bits_and_states_are_the_same_on_one_rank_and_two(dry: tuple[dict[str, Any], str]) -> None:
    digests = dry[0]["parts"]["exact digests"]["result"]["digests"]
    assert digests["1"] == digests["2"]
    assert digests["1"]["trainer"] != digests["1"]["data_parallel"]
    stages = dry[0]["parts"]["resume"]["result"]["stages"]
    assert stages["one"]["began"] == stages["save"]["ended"] != stages["one"]["ended"]
    assert stages["back"]["began"] == stages["one"]["ended"]
    assert [stages[name]["world"] for name in ("save", "one", "back")] == [2, 1, 2]
    assert len(stages["save"]["stalls"]) == len(stages["save"]["async_stalls"]) == 3
    assert "DIFFER" not in dry[1]


def test_a_part_that_fails_or_hangs_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multi_gpu

    def attempt(name: str, limit: float, on: Any, scratch: Path) -> dict[str, Any]:
        if name == "capture":
            return {"seconds": 3.0, "error": "NCCL error: lost", "result": None}
        result = {"size": "tiny", "stages": {}} if name == "resume" else {"environment": {}}
        return {"seconds": 1.0, "error": None, "result": result}

    monkeypatch.setattr(multi_gpu, "attempt", attempt)
    on = parts.Setting(2, "cpu", True, tmp_path)
    results = multi_gpu.measure(["capture", "resume"], 1e9, on)
    assert list(results["parts"]) == ["capture", "resume"]
    text = (tmp_path / "multi_gpu.md").read_text()
    assert "It failed:\n\n```\nNCCL error: lost\n```" in text
    assert "## resume" in text
    left = multi_gpu.measure(["resume"], 5.0, parts.Setting(2, "cuda", False, tmp_path))
    assert left["parts"]["resume"]["error"] == "left out, no time was left"


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    import multi_gpu

    on = parts.Setting(2, "cpu", True, tmp_path)
    found = multi_gpu.attempt("about", 0.01, on, tmp_path)
    assert found["result"] is None
    assert "stopped after 0 s" in found["error"]
    found = multi_gpu.attempt("no such part", 60, on, tmp_path)
    assert "KeyError: 'no such part'" in found["error"]


def test_a_number_of_gpus_that_is_no_power_of_two_is_refused() -> None:
    done = start("--gpus", "3")
    assert done.returncode == 2
    assert "--gpus: expected a power of two, got 3" in done.stderr


def result(**times: list[float]) -> dict[str, Any]:
    facts = {key: {"tokens": 1000, "world": 2} for key in times}
    names = {key: key.partition("@")[0] for key in times}
    return {"size": "tiny", "sides": names, "times": times, "facts": facts, "missing": {}}


def cells(lines: list[str], title: str) -> list[str]:
    row = next(line for line in lines if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_contest_table_has_speed_scaling_and_the_ratio_to_the_hand_written_side() -> None:
    found = result(loop_one=[10.0, 12.0], ddp=[20.0, 16.0], hf=[30.0, 24.0])
    found["facts"]["hf"] |= {
        "overlap": {"share": 0.75, "communication": 4000.0},
        "peak_memory": 5e9,
    }
    lines = report.contest_table(found)
    assert cells(lines, "plain loop, 1 GPU")[2:7] == ["11.00", "10.00 to 12.00", "90,909", "", ""]
    assert cells(lines, "DDP by hand")[5:7] == ["0.625", ""]
    assert cells(lines, "HF Trainer, DDP")[5:] == ["0.417", "1.500", "75% of 4.00 ms", "5.00"]


def test_sides_on_fewer_gpus_are_compared_among_themselves() -> None:
    found = result(loop_one=[10.0], ddp=[20.0], trainer=[30.0])
    more = result(**found["times"], **{"ddp@2": [15.0], "trainer@2": [18.0]})
    rows = [line for line in report.contest_table(more) if line.startswith("| our Trainer, DDP |")]
    assert [row.split("|")[7].strip() for row in rows] == ["1.500", "1.200"]


def test_a_contest_that_was_stopped_shows_what_it_has() -> None:
    found = result(loop_one=[10.0, 10.0], ddp=[20.0]) | {"missing": {"hf": "ValueError: lost"}}
    found["sides"]["hf"] = "hf"
    lines = report.contest_table(found)
    assert cells(lines, "DDP by hand")[5] == "0.500"
    assert lines[lines.index("HF Trainer, DDP: not measured.") :][3] == "ValueError: lost"
    nothing = report.contest_table({**found, "times": {"ddp": []}})
    assert nothing[0] == "No round was finished."
    assert "ValueError: lost" in nothing


def test_what_differs_is_shouted() -> None:
    each = {"trainer": "a" * 64, "data_parallel": "b" * 64}
    digests = {"size": "tiny", "digests": {"1": each, "2": {**each, "trainer": "c" * 64}}}
    whole = {"gpus": 2, "dry": False, "parts": {}}
    part = {"seconds": 1.0, "error": None, "result": digests}
    text = report.markdown({**whole, "parts": {"exact digests": part}})
    assert "trainer: the bits DIFFER on all." in text
    assert "data_parallel: the same bits on all." in text
    part = {**part, "result": {**digests, "digests": {"1": each}}}
    text = report.markdown({**whole, "parts": {"exact digests": part}})
    assert "There is nothing to compare." in text
    save = {"began_at": 0, "ended_at": 6, "began": "x", "ended": "y", "world": 2}
    save |= {"stalls": [9.0, 4.0, 6.0], "async_stalls": [7.0, 1.0, 1.0], "bytes": 2e9}
    one = {"began_at": 6, "ended_at": 8, "began": "z", "ended": "z", "world": 1}
    stages = {"size": "tiny", "stages": {"save": save, "one": one}}
    text = report.markdown({**whole, "parts": {"resume": {**part, "result": stages}}})
    assert "| one | 1 | 6 | 8 | DIFFERS |" in text
    assert "| async of sync | 0.200 |" in text


def test_more_gpus_add_sides_on_two() -> None:
    assert contest.entries(("loop_one", "ddp"), 2) == {
        "loop_one": ("loop_one", 1),
        "ddp": ("ddp", 2),
    }
    assert contest.entries(("loop_one", "ddp", "hf"), 4) == {
        "loop_one": ("loop_one", 1),
        "ddp": ("ddp", 4),
        "hf": ("hf", 4),
        "ddp@2": ("ddp", 2),
    }


def test_every_side_names_sides_that_there_are() -> None:
    for side in sides.SIDES.values():
        assert {side.base, side.rival} - {None} <= sides.SIDES.keys()
    used = {*contest.THROUGHPUT, *contest.CAPTURE, *contest.EXACT}
    assert used == sides.SIDES.keys()
