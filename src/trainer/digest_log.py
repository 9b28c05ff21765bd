"""``digests.jsonl``: digests of the training state on the way, so that two runs can be compared later.

``log_digest_steps=k`` appends a line after every k-th update, and one for the state that training begins
with. Each brings the whole state to the host and hashes it, so the device is waited for: choose k such
that this is a small part of k updates. Off, which is the default, nothing is computed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import define

import trainstep as ts
from trainer.checkpoint import io

logger = logging.getLogger(__name__)

NAME = "digests.jsonl"
"""The file's name in the output folder."""


@define
class DigestLog:
    """Appends to the log of one run.

    Attributes:
        path: the file.
        every: updates between two lines; 0 writes none.
    """

    path: Path
    every: int

    def add(self, trainer: Any) -> None:
        """Append the line of the state after this update, if it is due.

        If the disk refuses, that is warned of once, and no more lines are written in this run.
        """
        state = trainer._run.state
        if not self.every or state.step % self.every:
            return
        line = json.dumps(entry(trainer, leaves(trainer))) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self.every = 0
            logger.warning(
                "%s: no digests are logged from step %d on: %s", self.path, state.step, error
            )


def begin(trainer: Any, *, resumed: bool) -> DigestLog | None:
    """Start the log of a run, whose state is where it begins; None if none is asked for.

    Lines of an earlier run in the same folder go, also where this run logs none: a resumed run keeps
    those up to the step at which it goes on, any other run keeps nothing.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return None
    log = DigestLog(Path(args.output_dir) / NAME, args.log_digest_steps)
    step = trainer._run.state.step
    kept: dict[int, Any] = {}
    if log.path.exists():
        kept = truncate(log.path, step if resumed else -1)
    if not log.every:
        return None
    if step not in kept:
        log.add(trainer)
    return log


def leaves(trainer: Any) -> dict[str, str]:
    """Return ``trainstep.leaf_digests`` of the state as it is now."""
    trainer._sync_buffers()
    return ts.leaf_digests(trainer._run.state)


def entry(trainer: Any, leaves: Mapping[str, str]) -> dict[str, Any]:
    """Return what is logged of the state whose leaves have these digests.

    Returns:
        ``step``; ``epoch``, a fraction; ``loss`` of the last update, None before the first and where it is
        not finite; ``digest``, that of ``trainstep.digest(state)``; ``parts``, a digest for each
        of params, buffers, opt_state, extras, step and key that the state has.
    """
    run = trainer._run
    loss = float(run.metrics["loss"]) if "loss" in run.metrics else math.nan
    return {
        "step": run.state.step,
        "epoch": run.progress,
        "loss": loss if math.isfinite(loss) else None,
        "digest": combine(leaves),
        "parts": parts(leaves),
    }


def combine(leaves: Mapping[str, str]) -> str:
    """Return the digest of a state (``trainstep.digest``) from its leaves' (``leaf_digests``)."""
    joined = b"".join(bytes.fromhex(leaves[path]) for path in sorted(leaves))
    return hashlib.sha256(joined).hexdigest()


def parts(leaves: Mapping[str, str]) -> dict[str, str]:
    """Return a digest for each part of a state, which is what paths begin with."""
    grouped: dict[str, dict[str, str]] = {}
    for path, digest in leaves.items():
        grouped.setdefault(path.split("/")[0], {})[path] = digest
    return {name: combine(inner) for name, inner in sorted(grouped.items())}


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a log by step. A last line that was cut off is left out.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the first line that is no entry of a log.
    """
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        parsed = _parse(line)
        if parsed is None:
            raise ValueError(
                f"{path}, line {number}: not an entry of a log of digests: {line[:60]!r}"
            )
        found[parsed["step"]] = parsed
    return found


def truncate(path: Path, step: int) -> dict[int, dict[str, Any]]:
    """Drop the lines behind ``step``, and what is no entry; return what is left, by step.

    The file is replaced at once: cut off at any instant, it holds the old lines or the new ones.
    """
    data = path.read_bytes()
    entries = [(line, _parse(line)) for line in _whole_lines(path)]
    kept = [(line, found) for line, found in entries if found is not None and found["step"] <= step]
    text = b"".join(line + b"\n" for line, _ in kept)
    if text != data:
        temporary = path.with_name(f".{path.name}")
        io.remove_tree(temporary)
        with io.create(temporary) as file:
            io.write(file, text)
            io.sync_open(file)
        io.rename(temporary, path)
        io.sync_folder(path.parent)
    return {found["step"]: found for _, found in kept}


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        whole = type(found["step"]) is int and type(found["digest"]) is str
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if whole else None
