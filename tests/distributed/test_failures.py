"""One process fails: the other one ends as well, soon, and says why."""

from pathlib import Path

import pytest

from support.ranks.failing import TIMEOUT
from support.ranks.launch import TORCHRUN, start, wait

# The launcher looks after its processes so seldom that the error of the other one is seen first.
LAUNCHER = (*TORCHRUN, "--monitor_interval=4")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", 'another process: process 1: KeyError: "something of the user\'s"'),
        ("kill", f"is gone or did not answer within ddp_timeout={TIMEOUT} s"),
        ("late", "set a longer ddp_timeout"),
    ],
)
def test_the_other_process_ends_with_the_reason(how: str, words: str, tmp_path: Path) -> None:
    process = start(2, "failing", tmp_path, how, launcher=LAUNCHER)
    # A late process would sleep for 60 s; loading libraries on a busy machine takes long enough.
    result = wait(process, 2, tmp_path, limit=90)
    assert result.status != 0
    first, second = result.found
    assert words in first["error"]
    assert first["waited"] < TIMEOUT + 20  # of the 60 s that the other one is late
    assert second is None
    assert "PeerFailure" in result.output
