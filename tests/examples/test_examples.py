"""Every example runs and prints what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import ROOT

TINY = "--steps 6 --eval-steps 3 --save-steps 3 --batch-size 4 --length 16 --width 16 --layers 1"

EXAMPLES: dict[str, tuple[str, list[str]]] = {
    "char_lm.py": (
        f"{TINY} --sample 20 --out out",
        [
            r"419,645 bytes to train on, 46,628 held out; [\d,]+ parameters",
            r"step +train loss +held-out loss\n +3 +\d\.\d{3} +\d\.\d{3}\n +6 ",
            r"unigram model +3\.\d{3} ",
            r"zlib -9, this tenth +1\.464 ",
            r"this model +\d\.\d{3} +\d\.\d{3}\n",
            r"A sample:\nThe .",
            r"digest of the final state: [0-9a-f]{64}\n",
        ],
    ),
    "pure_step.py": (
        "",
        [
            r"step 300: loss 0\.\d+, accuracy 0\.\d+",
            r"held-out digits: loss 0\.\d+, accuracy 0\.9\d+",
            "replayed from step 150, same digest: True",
            "module untouched: True",
            "global generator untouched: True",
        ],
    ),
}
"""File -> (command line, patterns that its output has in this order)."""


def test_no_example_is_forgotten() -> None:
    assert sorted(EXAMPLES) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_keeps_its_promises(name: str, tmp_path: Path) -> None:
    options, patterns = EXAMPLES[name]
    if name == "pure_step.py":
        pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    position = 0
    for pattern in patterns:
        found = re.compile(pattern).search(done.stdout, position)
        assert found, f"{pattern!r} is not in the rest of:\n{done.stdout[position:]}"
        position = found.start()
    if name == "char_lm.py":
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["step"] == 6
        assert result["digest"] in done.stdout
        assert (tmp_path / "out" / "model.safetensors").exists()
