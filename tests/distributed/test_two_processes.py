"""What two processes do together; the checks themselves are in ``support.ranks.two``."""

import re
from pathlib import Path

import pytest

from support.ranks.launch import TESTS, launch


@pytest.mark.row(113, 139, 140, 145, 146)
def test_two_processes_act_as_one(tmp_path: Path) -> None:
    # From the script itself: in what is printed, lines of two processes may run into each other.
    source = (TESTS / "support" / "ranks" / "two.py").read_text()
    (checks,) = re.findall(r"^CHECKS = \[(.*?)^\]", source, re.MULTILINE | re.DOTALL)
    names = re.findall(r"\w+", checks)
    assert len(names) > 15
    result = launch(2, "two", tmp_path)
    assert result.found == [names, names]
    assert "destroy_process_group" not in result.output  # what PyTorch warns of at exit
    assert "UserWarning" not in result.output.replace("OMP_NUM_THREADS", "")
