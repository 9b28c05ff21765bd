"""``trainstep replay``: run some steps of a training again, and see whether they give the same bits."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.result import DIFFERENT, SAME, Refusal, Result

if TYPE_CHECKING:
    from trainer.cli.reading import Glance
    from trainer.cli.recorded import Recorded
    from trainer.replaying import Replay
    from trainstep import Divergence

SUMMARY = "run steps again from a checkpoint, and compare with what was recorded"
DESCRIPTION = """\
Run a training script again from a checkpoint and compare the digest of the
state after each step with what the run recorded: in digests.jsonl
(log_digest_steps) and in later checkpoints. The script is the one that
trained; give it the same arguments, behind --. Its first call of
Trainer.train() resumes from CKPT in a temporary output folder, without saving,
evaluating and trackers, and ends the script after the last step. What the
script does before that call it does again. What it prints goes to standard
error."""
EPILOG = """\
exit status:
  0  every step that was recorded came out the same
  1  a step differs
  2  the script failed, or nothing was recorded to compare with, or CKPT has no
     digest: it is in pieces, or DeepSpeed's

examples:
  trainstep replay runs/a/checkpoint-100 --script train.py
  trainstep replay runs/a/checkpoint-100 --script train.py --steps 20 -- --lr 3e-4 --out runs/a
  trainstep replay runs/a/checkpoint-100 --script train.py --log again.jsonl --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = (
        "trainstep replay CKPT --script SCRIPT [--steps N] [options] [-- SCRIPT ARGUMENTS]"
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="where to start")
    parser.add_argument("--script", type=Path, required=True, help="the script that trained")
    parser.add_argument(
        "--steps", metavar="N", type=int, help="updates to make (default: to the last one recorded)"
    )
    parser.add_argument(
        "--run",
        dest="recorded",
        metavar="DIR",
        type=Path,
        help="output folder, or digests.jsonl, to compare with (default: the folder CKPT is in)",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="evaluate when the run did. Needed if evaluation changes how training goes on; "
        "done anyway with reduce_lr_on_plateau",
    )
    parser.add_argument(
        "--log", metavar="FILE", type=Path, help="write the digests of all steps, for bisect"
    )


def run(options: argparse.Namespace) -> Result:
    """Replay, and compare."""
    import trainstep as ts
    from trainer.cli.reading import checkpoint_at, glance
    from trainer.cli.recorded import recorded
    from trainer.cli.scripts import run_script
    from trainer.replaying import Replay

    start = glance(checkpoint_at(options.checkpoint))
    if not start.digests:
        raise Refusal(
            f"{start.path}: it cannot be replayed, as it has no digest: {start.no_digest}"
        )
    known = recorded(options.recorded or start.path.resolve().parent)
    steps = _steps(options.steps, start, known)
    plateau = start.arguments.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    with tempfile.TemporaryDirectory(prefix="trainstep-replay-") as folder:
        replay = Replay(
            checkpoint=start.path.resolve(),
            steps=steps,
            output_dir=Path(folder),
            evaluate=options.evaluate or plateau,
        )
        run_script(options.script, options.script_arguments, replay)
    if options.log:
        _write_log(options.log, replay)
    first = start.manifest.step
    expected = {
        step: entry for step, entry in known.entries().items() if first < step <= first + steps
    }
    compared = [step for step in expected if step in replay.leaves]
    if not compared:
        raise Refusal(f"the replay ended at step {max(replay.leaves)}, before any step recorded")
    found = ts.bisect({first: start.digests, **expected}, replay.leaves)
    return _result(options, start, known, replay, found, compared)


def _steps(wanted: int | None, start: "Glance", known: "Recorded") -> int:
    """Return how many updates to make, so that there is something to compare."""
    first = start.manifest.step
    later = [step for step in known.entries() if step > first]
    if not later:
        raise Refusal(
            f"{known.path}: no digest after step {first} was recorded; train with "
            "log_digest_steps=1, or any number of steps, or replay an earlier checkpoint"
        )
    if wanted is None:
        return max(later) - first
    if wanted < min(later) - first:
        raise Refusal(
            f"--steps {wanted}: the first step recorded after the checkpoint's {first} is "
            f"{min(later)}; use --steps {min(later) - first} or more"
        )
    return wanted


def _write_log(path: Path, replay: "Replay") -> None:
    lines = [json.dumps(replay.lines[step]) + "\n" for step in sorted(replay.lines)]
    path.write_text("".join(lines), encoding="utf-8")


def _result(
    options: argparse.Namespace,
    start: "Glance",
    known: "Recorded",
    replay: "Replay",
    found: "Divergence | None",
    compared: list[int],
) -> Result:
    from trainer import digest_log
    from trainer.cli.findings import divergence_data
    from trainer.resuming import changed_arguments

    first = start.manifest.step
    more: tuple[Any, ...] = ()
    if found is not None:
        again = digest_log.parts(replay.leaves[found.step])
        before = digest_log.parts(start.digests) if found.step == first else known.parts(found.step)
        more = (
            (before, again),
            (known.loss(found.step), replay.lines[found.step]["loss"]),
            ("recorded", "replayed"),
        )
    changed = changed_arguments(start.arguments, replay.arguments)
    data = {
        "command": "replay",
        "checkpoint": str(options.checkpoint),
        "script": str(options.script),
        "reproduced": found is None,
        "first_step": first,
        "last_step": max(replay.leaves),
        "compared": sorted(compared),
        **divergence_data(found, *more),
        "arguments": {name: list(pair) for name, pair in sorted(changed.items())},
        "evaluated": replay.evaluate,
    }
    return Result(SAME if found is None else DIFFERENT, data, _text(data))


def _text(data: dict[str, Any]) -> list[str]:
    from trainer.cli.findings import divergence_text

    last, count = data["last_step"], len(data["compared"])
    lines = [
        f"replayed {data['checkpoint']} to step {last}, of which {count} "
        f"step{'s were' if count > 1 else ' was'} recorded"
    ]
    lines += ["reproduced: the same bits"] if data["reproduced"] else divergence_text(data)
    if data["arguments"]:
        lines.append("arguments that differ from those of the checkpoint")
        lines += [f"  {name}: {a!r} != {b!r}" for name, (a, b) in data["arguments"].items()]
    return lines
