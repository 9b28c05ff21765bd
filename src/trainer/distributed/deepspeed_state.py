"""DeepSpeed's checkpoints: written by all processes, and saved whole or not at all.

A checkpoint has the files of any checkpoint, and beside them what the engine saves: ``global_step<n>/``
with the files of all processes, ``latest`` and the scripts ``zero_to_fp32.py`` and ``zero_to_torch.py``.
Those in the folder are **pickles**, written by DeepSpeed and read by DeepSpeed only. The manifest has the
size and SHA-256 of each, which are compared before one is read: that finds damage, not malice, since
whoever can write the folder can write the manifest. Only resume from checkpoints that you trust.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from attrs import evolve

import trainstep as ts
from trainer import modeling
from trainer.checkpoint import CheckpointError, Contents, io, space
from trainer.checkpoint.hashing import Workers, hash_file, new_sha
from trainer.checkpoint.layout import DEEPSPEED, checkpoint_dir, sibling_dir
from trainer.checkpoint.manifest import File, Manifest
from trainer.checkpoint.place import publish, tidy
from trainer.checkpoint.weights import Stored
from trainer.checkpoint.writer import (
    Prepared,
    disk_errors,
    prepare,
    seal,
    write_model_files,
    write_texts,
)
from trainer.distributed import agree
from trainer.distributed.deepspeed_model import gathered_model, tag_of, write_engine
from trainer.distributed.deepspeed_plan import Zero
from trainer.distributed.ranks import Ranks

# Bytes that a number in a parameter takes in a checkpoint: a master weight, two moments, the weight.
_BYTES = 16


def contents_of(trainer: Any, contents: Contents) -> Contents:
    """Return what the ordinary files of a checkpoint hold: the engine saves parameters and moments."""
    zero: Zero = trainer._zero
    tensors = gathered_model(trainer) if zero.gathers else {}
    state = contents.state
    position = contents.position
    if state is not None:
        tag = tag_of(state.step)
        size = trainer._ranks.size
        facts = {"tag": tag, "stage": zero.stage, "half": zero.half, "world_size": size}
        position = {**position, DEEPSPEED: facts}
        state = ts.TrainState(state.step, {}, {}, (), state.key)

    return evolve(
        contents,
        state=state,
        position=position,
        write_model=trainer._save_tensors if tensors else trainer._write_beside_weights,
        model_tensors=tensors or None,
    )


def save(trainer: Any, root: Path, step: int, contents: Contents) -> Path:
    """Write ``root/checkpoint-<step>`` together, whole or not at all.

    Raises:
        CheckpointError: on every process, if one of them fails; what was in ``root`` is still there.
    """
    ranks: Ranks = trainer._ranks
    final, temporary = checkpoint_dir(root, step), sibling_dir(root, "tmp", step)
    prepared = prepare(contents)
    temporary = Path(agree.from_first(ranks, str(temporary)))
    what = f"saving step {step}"

    def first(act: Callable[[], Any]) -> Any:
        def careful() -> Any:
            with disk_errors(final):
                return act() if ranks.first else None

        return agree.together(ranks, what, careful, CheckpointError)

    try:
        stored = first(lambda: _begin(trainer, temporary, root, step, contents, prepared))
        records = agree.gather(ranks, _save_engine(trainer, temporary, final, step))
        first(lambda: _finish(temporary, final, step, contents, prepared, stored, records))
    except BaseException:
        if ranks.first:
            with suppress(OSError):
                io.remove_tree(temporary)
        raise
    return final


def _begin(
    trainer: Any, folder: Path, root: Path, step: int, contents: Contents, prepared: Prepared
) -> Stored:
    """Make the folder and write the model's files into it; on process 0."""
    root.mkdir(parents=True, exist_ok=True)
    tidy(root, step)
    numbers = sum(map(modeling.numel, trainer.model.parameters()))
    space.check(root, prepared.needed + _BYTES * numbers)
    io.make_folder(folder)
    stored = Stored(())
    write_model_files(folder, contents, stored)
    return stored


def _save_engine(trainer: Any, folder: Path, final: Path, step: int) -> dict[str, File]:
    """Let all processes write the engine's files; returns the entries of those that this one wrote."""

    def read_back() -> dict[str, File]:
        with disk_errors(final):
            if failures:
                raise failures[0]
            for path in written:
                io.sync_file(path)
            return {path.relative_to(folder).as_posix(): entry_of(path) for path in written}

    with _noting(trainer._zero.engine) as (written, failures):
        write_engine(trainer, folder, step)
    ranks = trainer._ranks
    return agree.together(ranks, f"saving step {step}", read_back, CheckpointError)


@contextmanager
def _noting(engine: Any) -> Iterator[tuple[list[Path], list[OSError | RuntimeError]]]:
    """Note which files the engine writes, and keep what the disk refuses until all have done their part.

    If one process raised in the middle of saving, the others would wait for it.
    """
    written: list[Path] = []
    failures: list[OSError | RuntimeError] = []
    files = engine.checkpoint_engine
    save = files.save

    def noted(state_dict: Any, path: str) -> None:
        try:
            save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save raises both if the disk is full
            failures.append(error if isinstance(error, OSError) else OSError(str(error)))
        written.append(Path(path))

    files.save = noted
    try:
        yield written, failures
    finally:
        del files.save


def _finish(
    folder: Path,
    final: Path,
    step: int,
    contents: Contents,
    prepared: Prepared,
    stored: Stored,
    records: list[dict[str, File]],
) -> None:
    """Write the JSON files and the manifest, and put the folder in its place; on process 0."""
    files = {name: file for record in records for name, file in record.items()}
    known = {*files, *stored.shas, *stored.trees}
    for path in sorted(folder.rglob("*")):  # "latest" and the scripts
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            io.sync_file(path)
            files[name] = entry_of(path)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{final}: process 0 does not see {', '.join(missing)}, which other processes wrote. "
            "output_dir must be on a file system that all machines share"
        )
    with closing(Workers(1)) as syncing:
        write_texts(folder, prepared, stored, syncing)
        syncing.join()
    files |= stored.files(folder, {})
    seal(folder, Manifest(step, contents.world_size, files, {}))
    publish(folder, final, step)


def entry_of(path: Path) -> File:
    sha = new_sha()
    hash_file(path, sha)
    return File(path.stat().st_size, sha.hexdigest())
