"""The script of docs/distributed.md, run as the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.ranks.launch import TORCHRUN

DOCS = Path(__file__).parents[2] / "docs"


def test_the_commands_print_the_same_digest(tmp_path: Path) -> None:
    page = (DOCS / "distributed.md").read_text()
    (script,) = re.findall(r"```python\n(# train.py\n.*?)```", page, flags=re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    assert "torchrun --nproc_per_node=2 train.py 2\n" in commands
    (tmp_path / "train.py").write_text(script)
    alone = run(tmp_path, "train.py", "4")
    two = run(tmp_path, *TORCHRUN, "--nproc_per_node=2", "train.py", "2")
    resumed = run(tmp_path, "train.py", "4", "resume")
    assert alone.removeprefix("1") == two.removeprefix("2") == resumed.removeprefix("1")
    assert alone.startswith("1 processes: ")


def run(folder: Path, *command: str) -> str:
    """Run Python; returns the last line that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
