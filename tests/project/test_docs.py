"""Documentation is code: the guide runs, tables name what exists, API pages are current."""

import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

import trainstep as ts

DOCS = Path(__file__).parents[2] / "docs"


def test_the_guide_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), flags=re.S)
    namespace: dict = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"guide.md, block {number}", "exec"), namespace)
    assert "was donated at step 200" in capsys.readouterr().out


def test_every_name_in_the_optax_table_exists():
    names = set(re.findall(r"`ts\.([A-Za-z_.]+)", (DOCS / "optax.md").read_text()))
    assert len(names) > 25
    for name in names:
        assert reduce(getattr, name.split("."), ts) is not None


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="signatures print as in Python 3.11")
def test_api_pages_are_what_the_docstrings_say():
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
