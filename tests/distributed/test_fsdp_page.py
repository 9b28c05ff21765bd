"""The script on ``fsdp`` in docs/distributed.md, run as the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.ranks.launch import TORCHRUN
from trainer.cli.entry import main

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    page = PAGE.read_text()
    (script,) = re.findall(r"```python\n(# sharded.py\n.*?)```", page, flags=re.DOTALL)
    blocks = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    (commands,) = (block for block in blocks if "sharded.py" in block)
    assert commands.splitlines() == [
        "torchrun --nproc_per_node=2 sharded.py",
        "torchrun --nproc_per_node=4 sharded.py resume",
        "trainstep consolidate runs/sharded/checkpoint-8 --out exported",
    ]
    (tmp_path / "sharded.py").write_text(script)
    two = run(tmp_path, "--nproc_per_node=2", "sharded.py")
    four = run(
        tmp_path, "--nproc_per_node=4", "sharded.py", "resume"
    )  # there is nothing left to do
    assert two.startswith("2 processes: ")
    assert float(two.split()[-1]) == float(four.split()[-1])
    checkpoint = tmp_path / "runs" / "sharded" / "checkpoint-8"
    assert main(["consolidate", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").exists()


def run(folder: Path, *arguments: str) -> str:
    """Start processes; returns the last line that they printed."""
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    source = str(PAGE.parents[1] / "src")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
