"""``trainstep bisect``: the first step at which two runs differ."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.result import DIFFERENT, SAME, Refusal, Result

if TYPE_CHECKING:
    from trainer.cli.recorded import Recorded
    from trainstep import Divergence

SUMMARY = "the first step at which two runs differ"
DESCRIPTION = """\
Compare what two runs recorded, step by step: the digests that log_digest_steps
wrote to digests.jsonl, and the states in checkpoints. Says after which step
they first differ, up to which they were equal, and how to find out more. Only
steps that both recorded are compared: a run that is shorter does not differ
for that. Checkpoints without a digest of the state (in pieces, or DeepSpeed's)
are passed over."""
EPILOG = """\
exit status:
  0  equal at every step that both recorded
  1  they differ
  2  nothing was recorded, or no step in common

examples:
  trainstep bisect runs/a runs/b
  trainstep bisect runs/a/digests.jsonl again.jsonl
  trainstep bisect runs/a runs/b --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), type=Path, help="an output folder, or a digests.jsonl"
        )


def run(options: argparse.Namespace) -> Result:
    """Compare the two runs."""
    import trainstep as ts
    from trainer.cli.findings import divergence_data
    from trainer.cli.recorded import recorded

    a, b = recorded(options.a), recorded(options.b)
    entries = a.entries(), b.entries()
    common = sorted(entries[0].keys() & entries[1].keys())
    if not common:
        raise Refusal(
            f"no step in common: {a.path} has {_range(entries[0])}, {b.path} has "
            f"{_range(entries[1])}"
        )
    found = ts.bisect(*entries)
    more: tuple[Any, ...] = ()
    if found is not None:
        more = (
            (a.parts(found.step), b.parts(found.step)),
            (a.loss(found.step), b.loss(found.step)),
            ("a", "b"),
        )
    data = {
        "command": "bisect",
        "a": str(a.path),
        "b": str(b.path),
        "same": found is None,
        "compared": common,
        **divergence_data(found, *more),
        "passed_over": a.passed_over + b.passed_over,
        "narrow": _commands(a, b, found) if found is not None else [],
    }
    return Result(SAME if found is None else DIFFERENT, data, _text(data))


def _range(steps: Any) -> str:
    return f"{len(steps)} from {min(steps)} to {max(steps)}"


def _commands(a: "Recorded", b: "Recorded", found: "Divergence") -> list[str]:
    """Return command lines that tell more; SCRIPT stands for the script that trained."""
    from trainer.cli.recorded import at_or_before, common_from

    commands = []
    pair = common_from(a, b, found.step)
    if pair is not None:
        commands.append(shlex.join(["trainstep", "diff", *map(str, pair)]))
    if found.last_equal is None:
        return commands
    narrow = found.step - found.last_equal > 1  # else the step is known
    logs = []
    for run, log in ((a, "a.jsonl"), (b, "b.jsonl")):
        start = at_or_before(run, found.last_equal)
        if start is None:
            continue
        step, path = start
        command = ["trainstep", "replay", str(path), "--script", "SCRIPT"]
        command += ["--steps", str(found.step - step), *(["--log", log] if narrow else [])]
        commands.append(shlex.join(command))
        logs.append(log)
    if narrow and len(logs) == 2:
        commands.append(shlex.join(["trainstep", "bisect", *logs]))
    return commands


def _text(data: dict[str, Any]) -> list[str]:
    from trainer.cli.findings import divergence_text

    steps = data["compared"]
    lines = [f"compared {len(steps)} steps, {steps[0]} to {steps[-1]}"]
    if data["same"]:
        lines.append("no difference")
    else:
        lines += divergence_text(data)
    if data["narrow"]:
        lines.append("to find out more, with the script that trained as SCRIPT")
        lines += [f"  {command}" for command in data["narrow"]]
    lines += [f"passed over: {reason}" for reason in data["passed_over"]]
    return lines
