"""``trainstep`` itself: help, version, errors on one line, a quick start."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainstep as ts
from support.processes import ROOT, python
from trainer.cli import main

COMMANDS = ("inspect", "verify", "diff", "replay", "bisect")


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"    {name}" in done.stdout for name in COMMANDS)
    assert "exit status:" in done.stdout


def test_help_and_mistakes_import_neither_torch_nor_transformers() -> None:
    code = """
import sys
from trainer.cli import main
assert main(["--help"]) == main(["diff", "--help"]) == 0
assert main(["verify"]) == main([]) == main(["replay", "x"]) == 2
print(sorted({"torch", "numpy", "attrs", "transformers"} & set(sys.modules) - {"attrs"}))
"""
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep(name, "--help")
    assert outcome.status == 0
    assert f"  trainstep {name} " in outcome.out.split("examples:")[1]
    assert "--json" in outcome.out


def test_version(trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("--version")
    assert (outcome.status, outcome.out) == (0, f"trainstep {ts.__version__}\n")


def test_mistakes_are_said_on_one_line(refused: Callable[..., str]) -> None:
    assert "required: COMMAND; see trainstep --help" in refused()
    assert "invalid choice: 'foo' (choose from" in refused("foo")
    assert "bisect" in refused("foo")
    assert "required: B; see trainstep diff --help" in refused("diff", "a")
    assert "unrecognized arguments: --leave" in refused("verify", "x", "--leave")
    assert "invalid int value: 'many'" in refused("replay", "x", "--script", "y", "--steps", "many")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_not_there(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    more = {"diff": [missing], "bisect": [missing], "replay": ["--script", "x.py"]}.get(name, [])
    assert f"trainstep: {missing}: no such" in refused(name, missing, *more)


def test_who_stops_reading_gets_no_traceback(runs: Path) -> None:
    code = "import sys; from trainer.cli import main; sys.exit(main(['inspect', 'a/checkpoint-4']))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 2


def test_main_takes_the_command_line_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainstep", "verify"])
    assert main() == 2
    assert "required: PATH" in capsys.readouterr().err
