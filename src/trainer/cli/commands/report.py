"""``trainstep report``: a run on one page."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.result import DIFFERENT, SAME, Refusal, Result, size

if TYPE_CHECKING:
    from trainer.cli.reading import Glance

SUMMARY = "a run on one page of Markdown: arguments, losses, checkpoints, digests"
DESCRIPTION = """\
Describe a run by what it left in its output folder, as Markdown: how far it
came, losses and metrics step by step, checkpoints with their digests, the log
of digests, arguments that are not the defaults. Reads no tensors unless
--verify is given."""
EPILOG = """\
exit status:
  0  written
  1  written; a checkpoint is damaged or incomplete
  2  there is no checkpoint in the folder

examples:
  trainstep report runs/a
  trainstep report runs/a --verify > report.md
  trainstep report runs/a --json"""

_ROWS = 24
"""Records that the text shows; of more, some that are spread over the run."""
_LEFT_OUT = ("step", "epoch", "total_flos")
_TIMED = ("_runtime", "_per_second")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="an output folder")
    parser.add_argument(
        "--verify", action="store_true", help="read every file and tensor of every checkpoint"
    )


def run(options: argparse.Namespace) -> Result:
    """Describe the run."""
    from trainer.checkpoint import list_checkpoints
    from trainer.cli.reading import glance

    root = options.run_folder
    found: list[Glance] = []
    checkpoints: list[dict[str, Any]] = []
    for path in list_checkpoints(root):
        try:
            one = glance(path)
        except Refusal as error:
            checkpoints.append({"name": path.name, "problems": [str(error)]})
            continue
        found.append(one)
        checkpoints.append(_checkpoint(one, options.verify))
    if not found:
        damaged = f", {len(checkpoints)} that cannot be read" if checkpoints else ""
        raise Refusal(f"{root}: no checkpoint of this package in it{damaged}")
    data = _describe(root, found[-1], checkpoints)
    whole = all(not one["problems"] for one in checkpoints)
    return Result(SAME if whole else DIFFERENT, data, _text(data))


def _checkpoint(found: "Glance", verify: bool) -> dict[str, Any]:
    from trainer import checkpoint

    files = found.manifest.files.values()
    return {
        "name": found.path.name,
        "step": found.manifest.step,
        "size": sum(file.size for file in files),
        "digest": found.digest,
        "verified": verify,
        "problems": checkpoint.verify(found.path) if verify else [],
    }


def _describe(root: Path, newest: "Glance", checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    from trainer import digest_log
    from trainer.cli.commands.inspect import not_default

    state = _newest_state(root, newest.trainer_state)
    log = root / digest_log.NAME
    try:
        lines = digest_log.read(log) if log.exists() else {}
    except ValueError as error:
        raise Refusal(str(error)) from None
    parameters = [leaf.numel for leaf in newest.leaves if leaf.path.startswith("params/")]
    return {
        "command": "report",
        "path": str(root),
        "step": state.get("global_step", newest.manifest.step),
        "max_steps": state.get("max_steps"),
        "epoch": state.get("epoch"),
        "parameters": sum(parameters) if parameters else None,
        "world_size": newest.manifest.world_size,
        "versions": newest.manifest.versions,
        "best": {
            "checkpoint": state.get("best_model_checkpoint"),
            "metric": state.get("best_metric"),
        },
        "history": state.get("log_history", []),
        "checkpoints": checkpoints,
        "digests": {str(step): line["digest"] for step, line in sorted(lines.items())},
        "arguments": not_default(newest.arguments),
    }


def _newest_state(root: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """Return what ``save_state`` wrote beside the checkpoints if it is of a later step."""
    try:
        state = json.loads((root / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return ours
    later = isinstance(state, dict) and state.get("global_step", 0) >= ours.get("global_step", 0)
    return state if later else ours


def _text(data: dict[str, Any]) -> list[str]:
    of = f" of {data['max_steps']:,}" if data["max_steps"] else ""
    epoch = "" if data["epoch"] is None else f", epoch {data['epoch']:.6g}"
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [f"# {data['path']}", "", f"- step {data['step']:,}{of}{epoch}"]
    if data["parameters"]:
        lines.append(f"- {data['parameters']:,} parameters")
    lines.append(f"- {data['world_size']} process{'es' if data['world_size'] > 1 else ''}")
    lines.append(f"- {versions}")
    if data["best"]["checkpoint"]:
        lines.append(f"- best: {data['best']['checkpoint']} ({data['best']['metric']})")
    lines += _losses(data["history"]) + _checkpoints(data["checkpoints"])
    if data["digests"]:
        steps = list(data["digests"])
        lines += ["", "## Log of digests", ""]
        lines.append(f"{len(steps)} steps, {steps[0]} to {steps[-1]}; the last: ")
        lines[-1] += f"`{data['digests'][steps[-1]]}`"
    rows = [[f"`{key}`", f"`{value!r}`"] for key, value in sorted(data["arguments"].items())]
    return [*lines, "", "## Arguments", "", *_table(["argument", "value"], rows)]


def _losses(history: list[dict[str, Any]]) -> list[str]:
    """Return a table with a row for every step at which something was logged."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in history:
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and not key.endswith(_TIMED) and key not in _LEFT_OUT
        }
        by_step.setdefault(record["step"], {}).update(numbers)
    keys = list(dict.fromkeys(key for numbers in by_step.values() for key in numbers))
    if not keys:
        return []
    steps = sorted(by_step)
    shown = steps
    if len(steps) > _ROWS:  # the first, the last, and some in between
        shown = [steps[i * (len(steps) - 1) // (_ROWS - 1)] for i in range(_ROWS)]
    rows = [
        [str(step), *(f"{by_step[step][k]:.6g}" if k in by_step[step] else "" for k in keys)]
        for step in shown
    ]
    more = [] if len(shown) == len(steps) else ["", f"{len(shown)} of {len(steps)} steps."]
    return ["", "## Losses and metrics", "", *_table(["step", *keys], rows), *more]


def _checkpoints(checkpoints: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in checkpoints:
        fine = "verified" if one.get("verified") else "not verified"
        rows.append(
            [
                one["name"],
                size(one["size"]) if "size" in one else "",
                f"`{one['digest']}`" if one.get("digest") else "",
                "; ".join(one["problems"]) or fine,
            ]
        )
    return ["", "## Checkpoints", "", *_table(["checkpoint", "size", "digest", ""], rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]
