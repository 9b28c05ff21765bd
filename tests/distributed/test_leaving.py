"""The end of a program of several processes."""

import sys
from pathlib import Path

import pytest

from support.ranks.launch import launch


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by Linux")
@pytest.mark.parametrize(
    "how", [["exact", "kept"], ["exact"], ["ddp"], ["exact", "destroyed"]], ids="-".join
)
def test_no_thread_of_gloo_is_left_to_ask_for_an_interpreter_that_shuts_down(
    tmp_path: Path, how: list[str]
) -> None:
    for names in launch(2, "leaving", tmp_path, *how).found:
        assert names
        assert not [name for name in names if "gloo" in name]


def test_threads_rest_at_the_end_if_somebody_keeps_their_group(tmp_path: Path) -> None:
    launch(2, "leaving", tmp_path, "ddp", "kept")
