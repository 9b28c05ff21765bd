"""What a run left behind to compare with: its log of digests, and the states in its checkpoints."""

from pathlib import Path
from typing import Any

from attrs import frozen

from trainer import digest_log
from trainer.checkpoint import list_checkpoints
from trainer.cli.reading import glance
from trainer.cli.result import Refusal


@frozen(eq=False)
class Recorded:
    """A run as it was recorded.

    Attributes:
        path: its output folder, or its log.
        lines: the entries of the log by step.
        leaves: the digests of the leaves of the states in checkpoints, by step. A checkpoint whose
            state is not the one that was logged (an evaluation changed it, say) is left out.
        checkpoints: the folders of those checkpoints that hold a state, by step.
        passed_over: checkpoints that cannot be read, or have no digest, with the reason.
    """

    path: Path
    lines: dict[int, dict[str, Any]]
    leaves: dict[int, dict[str, str]]
    checkpoints: dict[int, Path]
    passed_over: list[str]

    def entries(self) -> dict[int, Any]:
        """Return what ``trainstep.bisect`` takes: leaf by leaf where that is known."""
        return {step: line["digest"] for step, line in self.lines.items()} | self.leaves

    def parts(self, step: int) -> dict[str, str]:
        """Return the digest of each part of the state at a step, as far as it is known."""
        if step in self.leaves:
            return digest_log.parts(self.leaves[step])
        return dict(self.lines.get(step, {}).get("parts", {}))

    def loss(self, step: int) -> float | None:
        """Return the loss of the update that led to a step, if it was logged."""
        return self.lines.get(step, {}).get("loss")


def recorded(path: Path) -> Recorded:
    """Read what is known of a run.

    Args:
        path: its output folder, or a file such as ``digests.jsonl``.

    Raises:
        Refusal: if there is nothing, or it is damaged.
    """
    folder, log = (path, path / digest_log.NAME) if path.is_dir() else (None, path)
    if folder is None and not path.exists():
        raise Refusal(f"{path}: no such file or folder; give an output folder or a digests.jsonl")
    try:
        lines = digest_log.read(log) if log.exists() else {}
    except (ValueError, OSError) as error:
        raise Refusal(str(error)) from None
    run = Recorded(path, lines, {}, {}, [])
    for one in list_checkpoints(folder) if folder else []:
        try:
            found = glance(one)
        except Refusal as error:
            run.passed_over.append(str(error))
            continue
        if found.digests:
            step = found.manifest.step
            run.checkpoints[step] = one
            if lines.get(step, {}).get("digest") in (None, found.digest):
                run.leaves[step] = found.digests
        else:
            run.passed_over.append(f"{one}: it has no digest: {found.no_digest}")
    if not (lines or run.leaves) and run.passed_over:
        raise Refusal(f"{path}: nothing to compare with: {'; '.join(run.passed_over)}")
    if not (lines or run.leaves):
        what = f"neither {digest_log.NAME} nor a checkpoint in it" if folder else "it is empty"
        raise Refusal(
            f"{path}: {what}; train with log_digest_steps=1, or any number of steps, to have digests"
        )
    return run


def at_or_before(run: Recorded, step: int) -> tuple[int, Path] | None:
    """Return the step and the folder of a run's newest checkpoint up to a step."""
    found = [one for one in run.checkpoints if one <= step]
    return (max(found), run.checkpoints[max(found)]) if found else None


def common_from(a: Recorded, b: Recorded, step: int) -> tuple[Path, Path] | None:
    """Return the first checkpoints from a step on that both runs have."""
    found = [one for one in a.checkpoints if one >= step and one in b.checkpoints]
    return (a.checkpoints[min(found)], b.checkpoints[min(found)]) if found else None
