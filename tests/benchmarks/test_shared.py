"""What benchmarks share, and how their programs refuse what cannot be measured."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import shared

BENCHMARKS = Path(shared.__file__).parent
PROGRAMS = {
    "checkpoint": 1,
    "core": 1,
    "distributed": 1,
    "fine_tune": 1,
    "gpu_step": 1,
    "import_time": 5,
    "loader": 1,
    "memory": 1,
    "overhead": 1,
}


def main(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> Any:
    """Run a benchmark's ``main`` in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return importlib.import_module(name).main()


def test_all_that_have_rounds_are_listed() -> None:
    having = {path.stem for path in BENCHMARKS.glob("*.py") if '"--rounds"' in path.read_text()}
    assert having == PROGRAMS.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_too_few_rounds_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    least = PROGRAMS[name]
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, name, "--rounds", str(least - 1))
    told = capsys.readouterr().err
    assert f"argument --rounds: must be at least {least}, got {least - 1}" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gpu_step", []),
        ("fine_tune", []),
        ("determinism", []),
        ("memory", ["--device", "cuda"]),
        ("core", ["--device", "cuda"]),
    ],
)
def test_without_cuda_one_line_says_so(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^This needs a CUDA device; torch .* finds none\.$"):
        main(monkeypatch, name, *arguments)


def test_whole_numbers_are_read_and_others_are_not() -> None:
    assert shared.at_least(1)("7") == 7
    with pytest.raises(ValueError, match="seven"):
        shared.at_least(1)("seven")


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        (["lightning"], "lightning"),
        (["pytorch_lightning"], "pytorch_lightning"),
        (["lightning", "pytorch_lightning"], "lightning"),
    ],
)
def test_lightning_is_whichever_is_installed(
    installed: list[str], taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"stand_in_{len(installed)}_{taken}_"  # modules stay imported
    for name in installed:
        (tmp_path / f"{prefix}{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shared, "LIGHTNING", tuple(prefix + name for name in shared.LIGHTNING))
    assert shared.import_lightning().__name__ == prefix + taken


def test_without_lightning_both_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LIGHTNING", ("no_such_thing", "nor_this"))
    with pytest.raises(ImportError, match="neither of no_such_thing and nor_this is installed"):
        shared.import_lightning()


def test_versions_are_of_what_is_installed() -> None:
    found = shared.versions("cpu")
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"].endswith(" cores")
    assert found["python"].startswith("3.")


def test_figures_of_overhead_come_with_what_they_were_taken_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overhead = importlib.import_module("overhead")
    times = {"loop": [2.0, 4.0], "step": [3.0, 4.0]}
    monkeypatch.setattr(overhead.turns, "compete", lambda *_, **__: times)
    file = tmp_path / "found.json"
    main(monkeypatch, "overhead", "--models", "mlp", "--json", str(file))
    found = json.loads(file.read_text())
    assert found == {"about": shared.versions("cpu"), "mlp": times}
    assert "| pure step, donated | 3.500 | 3.000 to 4.000 | 1.250 |" in capsys.readouterr().out


def test_times_of_imports_are_a_table() -> None:
    import_time = importlib.import_module("import_time")
    times = {
        "base": [(1.0, 0.5), (2.0, 0.5), (1.5, 0.5)],
        "trainer": [(1.8, 0.6), (1.2, 0.6), (2.4, 0.6)],
    }
    assert import_time.table(import_time.summary(times)["sides"]).splitlines() == [
        "|  | wall clock, s (median) | ratio | processor, s | ratio |",
        "|---|---|---|---|---|",
        "| `import torch, accelerate` | 1.500 (1.000 to 2.000) | 1.00 | 0.500 | 1.00 |",
        "| and `import trainer` | 1.800 (1.200 to 2.400) | 1.20 | 0.600 | 1.20 |",
    ]


@pytest.mark.parametrize("reserved", [False, True])
def test_memory_shows_the_spread_of_peak_and_time(reserved: bool) -> None:
    memory = importlib.import_module("memory")
    loop = {"first loss": [5.0, 5.0], "ms a step": [10.0, 14.0], "peak MiB": [100.0, 200.0]}
    step = {"first loss": [5.0, 5.0], "ms a step": [9.0, 11.0], "peak MiB": [50.0, 120.0]}
    if reserved:
        loop["reserved MiB"] = step["reserved MiB"] = [300.0, 300.0]
    more = (" reserved MiB |", " 300.0 |") if reserved else ("", "")
    heading, _, first, second = memory.table({"loop": loop, "step": step}, "loop").splitlines()
    assert heading == (
        f"|  | peak MiB (median) | min to max | of plain PyTorch loop |{more[0]}"
        " ms a step (median) | min to max | first loss |"
    )
    assert first == (
        f"| plain PyTorch loop | 150.0 | 100.0 to 200.0 | 1.000 |{more[1]}"
        " 12.0 | 10.0 to 14.0 | 5.0000 |"
    )
    assert second == (
        f"| pure step, donated | 85.0 | 50.0 to 120.0 | 0.550 |{more[1]}"
        " 10.0 | 9.0 to 11.0 | 5.0000 |"
    )
