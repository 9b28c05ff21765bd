"""docs/cli.md: its commands run, and print what the page shows but for numbers and hashes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"```(python|sh|text)\n(.*?)```", PAGE, flags=re.S)


def shape(line: str) -> str:
    """Return a line without hashes, numbers and alignment."""
    line = re.sub(r"\b[0-9a-f]{12,}\b", "HASH", line)
    return " ".join(re.sub(r"-?\d[\w.,+\-]*", "N", line).split())


def test_the_commands_of_the_page_run_and_print_what_it_shows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainstep: Callable[..., Any],
    run_training: Callable[..., None],
) -> None:
    monkeypatch.chdir(tmp_path)
    printed: list[str] | None = None
    ran = compared = 0
    for kind, block in BLOCKS:
        if kind == "python":
            Path("train.py").write_text(block)
        elif kind == "sh":
            for line in block.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                ran += 1
                if program == "python":
                    run_training(Path(arguments[0]), *arguments[1:])
                    continue
                assert program == "trainstep"
                outcome = trainstep(*arguments)
                expected = re.search(r"# exit status (\d)", line)
                assert outcome.status == (int(expected[1]) if expected else 0), outcome
                printed = outcome.out.splitlines()
        elif printed is not None:
            for shown, real in zip(block.splitlines(), printed, strict="…" not in block):
                if "…" in shown:
                    break
                assert shape(shown) == shape(real)
            compared, printed = compared + 1, None
    assert (ran, compared) == (15, 9)


def test_the_page_names_every_command_and_every_key(trainstep: Callable[..., Any]) -> None:
    listed = trainstep("--help").out
    for name in ("inspect", "verify", "diff", "replay", "bisect", "report", "consolidate"):
        assert f"`trainstep {name} " in PAGE
        assert re.search(rf"^    {name}\b", listed, flags=re.M)


def test_the_keys_of_the_page_are_those_of_the_json(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    calls = {
        "inspect": ("a/checkpoint-4",),
        "verify": ("a",),
        "diff": ("a/checkpoint-8", "b/checkpoint-8"),
        "replay": ("a/checkpoint-4", "--script", "train.py"),
        "bisect": ("a", "b"),
        "report": ("a",),
    }
    table = PAGE[PAGE.index("## JSON") :]
    for name, arguments in calls.items():
        keys = set(trainstep(name, *arguments, "--json").data)
        row = re.search(rf"^\| `{name}` \|(.*)$", table, flags=re.M)
        assert row
        assert keys - {"command"} <= set(re.findall(r"`(\w+)`", row[1]))
