"""``trainstep inspect``: what a checkpoint is."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.result import SAME, Refusal, Result, columns, size

if TYPE_CHECKING:
    from trainer.cli.reading import Glance

SUMMARY = "what a checkpoint is: step, digest, files, leaves, arguments"
DESCRIPTION = """\
Say what a checkpoint is: format, step and place in the data, digest of the
state, versions, files, tensors, arguments. Reads no tensors and opens no
pickle, so it is quick and safe. Of an output folder the checkpoint of the
highest step is described. Folders that the Hugging Face Trainer wrote are
described as far as that goes."""
EPILOG = """\
examples:
  trainstep inspect runs/a
  trainstep inspect runs/a/checkpoint-100
  trainstep inspect runs/a/checkpoint-100 --leaves
  trainstep inspect runs/a/checkpoint-100 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="folder of a checkpoint, or of several"
    )
    parser.add_argument("--leaves", action="store_true", help="list every tensor")
    parser.add_argument(
        "--arguments", action="store_true", help="list all arguments, not only those changed"
    )


def run(options: argparse.Namespace) -> Result:
    """Describe the checkpoint."""
    from trainer.checkpoint.layout import MANIFEST
    from trainer.cli import foreign
    from trainer.cli.reading import glance, newest_at

    path = newest_at(options.checkpoint)
    if (path / MANIFEST).exists():
        found = glance(path)
        data = {"command": "inspect", "path": str(path), **_describe(found)}
        changed = data["arguments"] if options.arguments else not_default(data["arguments"])
    elif foreign.is_foreign(path):
        data = {"command": "inspect", "path": str(path), **foreign.survey(path)}
        changed = {}
    else:
        raise Refusal(
            f"{path}: no checkpoint: it has no {MANIFEST} and none of Hugging Face's files. If a "
            f"save was cut off there, `trainstep verify {path}` says so"
        )
    return Result(SAME, data, _text(data, changed, options.leaves))


def _describe(found: "Glance") -> dict[str, Any]:
    state = found.trainer_state
    leaves = [
        {
            "path": leaf.path,
            "dtype": leaf.dtype,
            "shape": list(leaf.shape),
            "numel": leaf.numel,
            "nbytes": leaf.nbytes,
            "file": leaf.file,
            "digest": leaf.digest,
        }
        for leaf in found.leaves
    ]
    parameters = [leaf.numel for leaf in found.leaves if leaf.path.startswith("params/")]
    position = {
        key: found.position.get(key)
        for key in ("epoch", "batch", "in_epoch", "batch_size", "accumulation")
    }
    return {
        "format": found.format,
        "step": found.manifest.step,
        "max_steps": state.get("max_steps"),
        "epoch": state.get("epoch"),
        "position": position,
        "world_size": found.manifest.world_size,
        "digest": found.digest,
        "parameters": sum(parameters) if parameters else None,
        "versions": found.manifest.versions,
        "best": {
            "checkpoint": state.get("best_model_checkpoint"),
            "metric": state.get("best_metric"),
        },
        "files": [
            {"name": name, "size": file.size, "sha256": file.sha256}
            for name, file in sorted(found.manifest.files.items())
        ],
        "leaves": leaves,
        "arguments": found.arguments,
    }


def not_default(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments whose values are not the defaults."""
    from trainer.arguments import Seq2SeqTrainingArguments

    defaults = Seq2SeqTrainingArguments(output_dir="").to_sanitized_dict()
    return {
        name: value
        for name, value in arguments.items()
        if name not in defaults or defaults[name] != value
    }


def _text(data: dict[str, Any], arguments: dict[str, Any], leaves: bool) -> list[str]:
    lines = [data["path"], *columns(list(_facts(data)))]
    files = [(size(file["size"]), file["name"]) for file in data["files"]]
    lines += ["files", *columns(files)]
    if data["leaves"]:
        rows = _every_leaf(data["leaves"]) if leaves else _summary(data["leaves"])
        lines += ["tensors", *columns(rows)]
    if arguments:
        lines += ["arguments", *columns([(k, repr(v)) for k, v in sorted(arguments.items())])]
    return lines


def _facts(data: dict[str, Any]) -> Iterable[tuple[str, str]]:
    versions = [f"{name} {version}" for name, version in data["versions"].items() if version]
    yield "format", data["format"] + (f" ({', '.join(versions)})" if versions else "")
    model = data.get("model", {})
    if model.get("type"):
        yield "model", f"{model['type']} ({', '.join(model['architectures'] or ['?'])})"
    if data["step"] is not None:
        of = f" of {data['max_steps']:,}" if data["max_steps"] else ""
        epoch = "" if data["epoch"] is None else f", epoch {data['epoch']:.6g}"
        yield "step", f"{data['step']:,}{of}{epoch}"
    position = data.get("position", {})
    if position.get("epoch") is not None:
        where = f"epoch {position['epoch']}, micro-batch {position['batch']} of it"
        yield "next data", f"{where}; batches of {position['batch_size']}"
    if data["world_size"]:
        yield "processes", str(data["world_size"])
    if data["parameters"] is not None:
        yield "parameters", f"{data['parameters']:,}"
    if "digest" in data:
        from trainer.cli.reading import why_no_digest

        yield "digest", data["digest"] or f"none: {why_no_digest(data['format'])}"
    if data["best"]["checkpoint"]:
        yield "best", f"{data['best']['checkpoint']} ({data['best']['metric']})"
    if data.get("not_opened"):
        yield "not opened", f"pickles: {', '.join(data['not_opened'])}"


def _every_leaf(leaves: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (leaf["path"], leaf["dtype"], str(tuple(leaf["shape"])), leaf.get("digest", "")[:12])
        for leaf in leaves
    ]


def _summary(leaves: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Add the tensors up by dtype and by what their paths begin with, or by their files."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for leaf in leaves:
        part = leaf["path"].split("/")[0] if "digest" in leaf else leaf["file"]
        groups.setdefault((part, leaf["dtype"]), []).append(leaf)
    return [
        (
            part,
            dtype,
            f"{len(group):,} tensor{'s' if len(group) > 1 else ''}",
            f"{sum(leaf['numel'] for leaf in group):,} numbers",
            size(sum(leaf["nbytes"] for leaf in group)),
        )
        for (part, dtype), group in groups.items()
    ]
