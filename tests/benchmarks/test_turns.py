"""Contenders that take turns: what becomes of those that fail, or do not answer."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import turns

BENCHMARKS = str(Path(turns.__file__).parent)
BEGIN = f"""
import sys, time
sys.path.insert(0, {BENCHMARKS!r})
import turns
"""
GOOD = (
    BEGIN
    + """
print("what libraries\\nprint")
gate = turns.Gate(2, warm=1, first=3, waits=WAITS)
while True: gate()
"""
)
FAILS = BEGIN + "print('a line', file=sys.stderr); raise ValueError('no such thing')"
DIES = (
    BEGIN
    + """
gate = turns.Gate(2, waits=WAITS)
for _ in range(4): gate()
sys.exit("RuntimeError: lost")
"""
)
STUCK = (
    BEGIN
    + """
gate = turns.Gate(2, waits=WAITS)
gate(), gate()
time.sleep(600)
"""
)


@pytest.mark.parametrize("together", [False, True])
def test_those_that_fail_are_dropped_and_the_others_go_on(
    together: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    programs = {"good": GOOD, "fails": FAILS, "dies": DIES, "stuck": STUCK, "other": GOOD}
    commands = {
        name: [sys.executable, "-c", text.replace("WAITS", str(together))]
        for name, text in programs.items()
    }
    seen: list[dict[str, int]] = []
    logs: dict[str, list[str]] = {}
    times = turns.compete(
        commands,
        3,
        {name: name.title() for name in programs},
        together=together,
        patience=4,
        first=100,
        after=lambda times: seen.append({name: len(values) for name, values in times.items()}),
        lost=lambda name, log: logs.update({name: log}),
    )
    assert {name: len(values) for name, values in times.items()} == {"good": 3, "other": 3}
    assert all(value > 0 for values in times.values() for value in values)
    assert seen[-1] == {"good": 3, "other": 3}
    assert len(seen) == 3
    assert logs.keys() == {"fails", "dies", "stuck"}
    assert logs["fails"][0] == "a line"
    told = capfd.readouterr().out
    assert "Fails: skipped (ValueError: no such thing)" in told
    assert "Dies: skipped (RuntimeError: lost)" in told
    assert "Stuck: skipped (it did not answer in time)" in told
