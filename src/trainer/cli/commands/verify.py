"""``trainstep verify``: whether checkpoints are what was written."""

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.cli.result import DIFFERENT, SAME, Refusal, Result, columns, size

SUMMARY = "whether every file and every tensor is what was saved"
DESCRIPTION = """\
Read a checkpoint, or all checkpoints of an output folder, from beginning to
end: size and SHA-256 of every file and the digest of every tensor must be
those in the manifest. One line for each file, with the reason if it is
damaged, and for each damaged tensor. A checkpoint that the Hugging Face
Trainer wrote has no manifest: its files must be there and whole."""
EPILOG = """\
exit status:
  0  all are undamaged
  1  at least one is damaged or incomplete
  2  there is no checkpoint

examples:
  trainstep verify runs/a/checkpoint-100
  trainstep verify runs/a
  trainstep verify runs/a --leaves
  trainstep verify runs/a --json"""

_MARKS = {True: "ok", False: "damaged", None: "not read"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="folder of a checkpoint, or of several"
    )
    parser.add_argument("--leaves", action="store_true", help="a line for undamaged tensors, too")


def run(options: argparse.Namespace) -> Result:
    """Verify each checkpoint."""
    found = [_examine(path) for path in _checkpoints(options.path)]
    damaged = [one["path"] for one in found if not one["ok"]]
    data = {"command": "verify", "ok": not damaged, "checkpoints": found}
    text = [line for one in found for line in _text(one, options.leaves)]
    if len(found) > 1:
        text.append(f"{len(found)} checkpoints, {len(damaged)} damaged")
    return Result(DIFFERENT if damaged else SAME, data, text)


def _checkpoints(path: Path) -> list[Path]:
    from trainer.checkpoint import list_checkpoints
    from trainer.checkpoint.layout import MANIFEST, TRAIN_STATE, step_of

    if not path.is_dir():
        raise Refusal(f"{path}: no such folder; give a checkpoint or a folder with checkpoints")
    # A checkpoint whose manifest is lost is damaged rather than none.
    if (path / MANIFEST).exists() or (path / TRAIN_STATE).exists() or step_of(path) is not None:
        return [path]
    found = list_checkpoints(path)
    if not found:
        raise Refusal(f"{path}: it is no checkpoint, and none named checkpoint-<step> is in it")
    return found


def _examine(path: Path) -> dict[str, Any]:
    from trainer.checkpoint import CheckpointError, verify
    from trainer.checkpoint.hf_format import is_foreign
    from trainer.checkpoint.layout import MANIFEST
    from trainer.checkpoint.manifest import parse_manifest

    problems = verify(path, leaves=True)
    if is_foreign(path):
        return _foreign(path, problems)
    try:
        manifest = parse_manifest((path / MANIFEST).read_bytes())
    except (CheckpointError, OSError):
        return {
            "path": str(path),
            "ok": False,
            "step": None,
            "manifest": False,
            "problems": problems,
            "files": [],
            "leaves": [],
        }
    reasons = {name: _of_file(problems, name) for name in sorted(manifest.files)}
    named = {f"{name}: {reason}" for name, own in reasons.items() for reason in own}
    return {
        "path": str(path),
        "ok": not problems,
        "step": manifest.step,
        "manifest": True,
        "problems": [problem for problem in problems if problem not in named],
        "files": [
            {"name": name, "size": manifest.files[name].size, "ok": not own, "reasons": own}
            for name, own in reasons.items()
        ],
        "leaves": _leaves(path, sorted(manifest.leaves), reasons),
    }


def _foreign(path: Path, problems: list[str]) -> dict[str, Any]:
    """Describe a folder that the Hugging Face Trainer wrote, which has no digests to compare with."""
    from trainer.checkpoint.layout import step_of

    reasons = {
        file.name: _of_file(problems, file.name)
        for file in sorted(path.iterdir())
        if file.is_file()
    }
    named = {f"{name}: {reason}" for name, own in reasons.items() for reason in own}
    return {
        "path": str(path),
        "ok": not problems,
        "step": step_of(path),
        "manifest": False,
        "problems": [problem for problem in problems if problem not in named],
        "files": [
            {"name": name, "size": (path / name).stat().st_size, "ok": not own, "reasons": own}
            for name, own in reasons.items()
        ],
        "leaves": [],
    }


def _of_file(problems: list[str], name: str) -> list[str]:
    start = f"{name}: "
    return [problem.removeprefix(start) for problem in problems if problem.startswith(start)]


def _leaves(path: Path, leaves: list[str], reasons: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return the tensors with their files; ``ok`` is None where the values could not be read."""
    from trainer.checkpoint.layout import OPTIMIZER, TRAIN_STATE

    if reasons[TRAIN_STATE]:  # it says where they are
        return [{"path": leaf, "file": None, "ok": None} for leaf in leaves]
    where = json.loads((path / TRAIN_STATE).read_bytes())["where"]
    found = []
    for leaf in leaves:
        file = where.get(leaf, (OPTIMIZER,))[0]
        own = reasons.get(file, [])
        ok: bool | None = True
        if {f"the values of {leaf} are not those saved", f"{leaf} is not in it"} & set(own):
            ok = False
        elif _unread(file, own):
            ok = None
        found.append({"path": leaf, "file": file, "ok": ok})
    return found


def _unread(file: str, reasons: list[str]) -> bool:
    """Tell whether the tensors in a damaged file could not be looked at one by one."""
    starts = ["missing", "it has ", "it cannot be read"]
    if not file.endswith(".safetensors"):
        starts.append("its SHA-256")  # a pickle that is damaged is not opened
    return any(reason.startswith(tuple(starts)) for reason in reasons)


def _text(one: dict[str, Any], leaves: bool) -> list[str]:
    damaged = sum(leaf["ok"] is False for leaf in one["leaves"])
    unread = sum(leaf["ok"] is None for leaf in one["leaves"])
    counts = f"{len(one['leaves'])} tensors" if one["manifest"] else "no manifest"
    counts += f", {damaged} damaged" if damaged else ""
    counts += f", {unread} not read" if unread else ""
    rows = [("damaged", problem, "") for problem in one["problems"]]
    rows += [
        (_MARKS[file["ok"]], file["name"], "; ".join(file["reasons"]) or size(file["size"]))
        for file in one["files"]
    ]
    rows += [
        (_MARKS[leaf["ok"]], leaf["path"], f"in {leaf['file']}" if leaf["file"] else "")
        for leaf in one["leaves"]
        if leaves or not leaf["ok"]
    ]
    return [f"{one['path']}: {'ok' if one['ok'] else 'DAMAGED'} ({counts})", *columns(rows)]
