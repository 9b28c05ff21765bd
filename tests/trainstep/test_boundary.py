"""The core knows nothing of the shell, and does no I/O."""

import ast
import json
from collections.abc import Collection
from pathlib import Path

import pytest

from support.processes import ROOT, python

SHELL = {"trainer", "accelerate", "transformers", "datasets", "tqdm", "safetensors", "peft"}
WORLD = {
    "os", "io", "pathlib", "shutil", "tempfile", "glob", "pickle", "sqlite3",
    "socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib",
    "subprocess", "multiprocessing", "asyncio", "time", "datetime", "random", "logging",
}  # fmt: skip
CALLS = {
    "open",
    "print",
    "input",
    "exec",
    "eval",
    "breakpoint",
    "__import__",
    "torch.save",
    "torch.load",
}
# Looks whether others have drawn from it, and draws nothing.
ALLOWED = {"rehearsal.py": {"random"}}
SOURCES = sorted((ROOT / "src" / "trainstep").rglob("*.py"))


def loaded_by(statement: str, *paths: Path) -> set[str]:
    """Return the top-level modules that a statement loads in a process that has imported torch."""
    code = f"""
import json, sys
sys.path[:0] = {[str(p) for p in paths]}
import torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.split('.')[0] for name in set(sys.modules) - before}})))
"""
    return set(json.loads(python(code)))


def violations(source: str, allowed: Collection[str] = ()) -> list[str]:
    """Return what a file of the core may not do: imports and calls, with their lines."""
    forbidden = (SHELL | WORLD).difference(allowed)
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module).split(".")[0]]
        found += [f"line {node.lineno}: imports {n}" for n in names if n in forbidden]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(f"line {node.lineno}: calls {ast.unparse(node.func)}")
    return found


def test_importing_the_core_loads_nothing_of_the_shell() -> None:
    loaded = loaded_by("import trainstep")
    assert "trainstep" in loaded
    assert not loaded & SHELL


def test_that_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").touch()
    (tmp_path / "guest.py").write_text("import trainstep, transformers")
    assert loaded_by("import guest", tmp_path) & SHELL == {"transformers"}


def test_there_are_sources_to_scan() -> None:
    assert {"step.py", "model.py", "adam.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_no_file_of_the_core_imports_the_shell_or_does_io(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), ALLOWED.get(path.name, ())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import trainer", "line 1: imports trainer"),
        ("from trainer.loop import run", "line 1: imports trainer"),
        ("def f():\n    import transformers as t", "line 2: imports transformers"),
        ("import os.path", "line 1: imports os"),
        ("import attrs, requests", "line 1: imports requests"),
        ("with open('x') as f:\n    pass", "line 1: calls open"),
        ("torch.save(x, 'y')", "line 1: calls torch.save"),
        ("\nprint(1)", "line 2: calls print"),
    ],
)
def test_the_scan_can_fail(source: str, found: str) -> None:
    assert violations(source) == [found]


def test_the_scan_knows_what_is_allowed() -> None:
    assert violations("from trainstep import rng\nimport torch\nopener(1)\nx.open()") == []
