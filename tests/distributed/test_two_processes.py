"""What two processes do together; the checks themselves are in ``support.ranks.two``."""

import re
from pathlib import Path

import pytest

from support.ranks.launch import launch


@pytest.mark.row(113, 139, 140, 145, 146)
def test_two_processes_act_as_one(tmp_path: Path) -> None:
    result = launch(2, "two", tmp_path)
    names = re.findall(r"^process 0: (\w+)$", result.output, re.MULTILINE)
    first, second = result.found
    assert first == second
    assert len(first) > 15
    assert set(names) <= set(first)  # lines of two processes may run into each other
    assert "destroy_process_group" not in result.output  # what PyTorch warns of at exit
    assert "UserWarning" not in result.output.replace("OMP_NUM_THREADS", "")
