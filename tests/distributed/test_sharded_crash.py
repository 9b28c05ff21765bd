"""A save in parts may fail or die at any call of any process: a complete checkpoint always remains."""

from pathlib import Path

import pytest

from support.ranks.launch import launch


@pytest.mark.row(191)
def test_a_complete_checkpoint_remains_wherever_one_of_two_processes_stops(tmp_path: Path) -> None:
    first, second = launch(2, "swept", tmp_path).found
    assert first["broken"] == []
    assert first["points"] == second["points"] >= 200
    assert -1 not in second["steps"]  # every point was reached
    assert set(first["steps"]) == {5, 10}  # before the checkpoint has its name, and after
