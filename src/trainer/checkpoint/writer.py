"""``save``: one checkpoint, complete or not there at all.

Everything is written into a hidden sibling of the checkpoint, brought to the disk, and renamed. At no
instant, killed or out of power, is there less than was complete before.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from attrs import define
from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpoint import hf_writer, io, space
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hashing import Hashing, Workers, new_sha
from trainer.checkpoint.layout import (
    ARGUMENTS,
    EXTRAS,
    MANIFEST,
    OPTIMIZER,
    PARTIAL,
    TRAIN_STATE,
    TRAINER_STATE,
    WEIGHTS,
    checkpoint_dir,
    host_rng_name,
    sibling_dir,
)
from trainer.checkpoint.manifest import File, Manifest, to_json
from trainer.checkpoint.place import publish, tidy
from trainer.checkpoint.weights import Stored, absorb_model, split, write_leaves
from trainstep.serialize import to_flat


def save(root: str | os.PathLike[str], step: int, contents: Contents) -> Path:
    """Write ``root/checkpoint-<step>``, replacing one that is there; return its path.

    The same contents give the same bytes. Remains of saves that were killed are removed first.

    Raises:
        CheckpointError: if there is too little space, the disk refuses, or the contents cannot be
            stored. What was in ``root`` before is then still there. Whether training can go on
            without this checkpoint is the caller's to decide.
    """
    root = Path(root)
    final, temporary = checkpoint_dir(root, step), sibling_dir(root, "tmp", step)
    prepared = prepare(contents)
    with disk_errors(final):
        root.mkdir(parents=True, exist_ok=True)
        tidy(root, step)
        space.check(root, prepared.needed)
        try:
            _write(temporary, step, contents, prepared)
            publish(temporary, final, step)
        except BaseException:
            with suppress(OSError):
                io.remove_tree(temporary)
            raise
    return final


@define
class Prepared:
    """What is known before anything is written: files by name, leaves by path, bytes in all."""

    files: dict[str, bytes]
    leaves: dict[str, Tensor]
    train_state: dict[str, Any]
    needed: int


def prepare(contents: Contents) -> Prepared:
    """Turn all but the tensors into bytes, so that what JSON refuses is refused before writing."""
    files = {TRAINER_STATE: contents.trainer_state.encode()}
    parts: dict[str, Any] = {ARGUMENTS: contents.arguments}
    parts |= {host_rng_name(rank): state for rank, state in contents.host_rng.items()}
    leaves: dict[str, Tensor] = {}
    metadata = None
    for name, value in parts.items():
        files[name] = _json(name, value)
    _json(f"{TRAIN_STATE} (data position)", contents.position)
    if contents.state is not None:
        leaves, metadata = to_flat(contents.state)
        _check_leaves(leaves)
    weighed = leaves or contents.model_tensors or {}
    needed = space.estimate(weighed.values(), files.values())
    return Prepared(files, leaves, {"state": metadata, "position": contents.position}, needed)


def _json(name: str, value: Any) -> bytes:
    try:
        return to_json(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: not a JSON value: {error}; nothing was written. Use numbers, strings, lists and "
            "dicts with string keys"
        ) from error


def _check_leaves(leaves: dict[str, Tensor]) -> None:
    for path, tensor in leaves.items():
        if hasattr(tensor, "placements") or tensor.is_sparse or tensor.device.type == "meta":
            raise CheckpointError(
                f"{path}: a {type(tensor).__name__} on {tensor.device} ({tensor.layout}), expected "
                "a whole dense tensor; gather it before saving"
            )


def _write(folder: Path, step: int, contents: Contents, prepared: Prepared) -> None:
    io.make_folder(folder)
    files, leaves = _write_files(folder, contents, prepared)
    seal(folder, Manifest(step=step, world_size=contents.world_size, files=files, leaves=leaves))


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder that is complete but for it, and bring the folder to the disk."""
    with io.create(folder / MANIFEST) as file:
        io.write(file, manifest.render())
        io.sync_open(file)
    for inner in [path for path in sorted(folder.rglob("*")) if path.is_dir()]:
        io.sync_folder(inner)
    io.sync_folder(folder)


def _write_files(
    folder: Path, contents: Contents, prepared: Prepared
) -> tuple[dict[str, File], dict[str, str]]:
    """Write all but the manifest; return its entries on the files, and the digests of the leaves.

    The optimizer's file is written in a thread while the model writes its own.
    """
    stored, (weights, others) = Stored(prepared.leaves), split(prepared.leaves)
    settle(prepared.leaves)
    with (
        Hashing() as hashing,
        closing(Workers(2)) as syncing,
        closing(Workers(1)) as writing,
        closing(Workers(2)) as comparing,
    ):
        more = (stored, hashing, syncing)
        name = OPTIMIZER
        if contents.hf is not None:
            name, others = EXTRAS, hf_writer.take_leaves(contents.hf, others, stored, hashing)
        separate = contents.state is not None and (bool(others) or name == OPTIMIZER)
        if separate:
            writing.put(write_leaves, folder / PARTIAL, name, others, *more)
        contents.put_model(folder)
        absorb(folder, weights, *more, comparing)
        if rest := {path: leaf for path, leaf in weights.items() if path not in stored.where}:
            write_leaves(folder / WEIGHTS, WEIGHTS, rest, *more)
        if contents.hf is not None:
            hf_writer.write_parts(
                folder, contents.hf, contents.host_rng, contents.world_size, *more
            )
        writing.join()
        write_texts(folder, prepared, stored, syncing)
        hashing.join()
        syncing.join()
        if separate:
            _rename_new(folder / PARTIAL, folder / name)
    return stored.files(folder, hashing.leaves), hashing.leaves


def write_model_files(folder: Path, contents: Contents, stored: Stored) -> None:
    """Let the model write its files, of which no leaf is looked for, and bring them to the disk."""
    contents.put_model(folder)
    with Hashing() as hashing, closing(Workers(1)) as syncing, closing(Workers(1)) as comparing:
        absorb(folder, {}, stored, hashing, syncing, comparing)
        hashing.join()
        syncing.join()


def write_texts(folder: Path, prepared: Prepared, stored: Stored, syncing: Workers) -> None:
    """Write the JSON files; ``train_state.json`` says where the leaves in ``stored`` are."""
    # Sorted, as several threads put entries there.
    where = {"where": dict(sorted(stored.where.items())), "raw": dict(sorted(stored.raw.items()))}
    files = {**prepared.files, TRAIN_STATE: to_json({**prepared.train_state, **where})}
    for name, data in files.items():
        with io.create(folder / name) as file:
            io.write(file, data)
        syncing.put(io.sync_file, folder / name)
        stored.shas[name] = new_sha(data)


def settle(leaves: dict[str, Tensor]) -> None:
    """Wait for the devices, so that threads read finished tensors whatever stream wrote them."""
    for device in {leaf.device for leaf in leaves.values() if leaf.is_cuda}:
        torch.cuda.synchronize(device)


def absorb(folder: Path, *arguments: Any) -> None:
    """``absorb_model``, whose refusal is a CheckpointError."""
    try:
        absorb_model(folder, *arguments)
    except ValueError as error:
        raise CheckpointError(
            f"write_model left a file that is not in the safetensors format, {error}"
        ) from error


def _rename_new(source: Path, target: Path) -> None:
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    io.rename(source, target)


@contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """Turn what the disk refuses into a CheckpointError on the checkpoint ``final``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: it could not be written: {error}. {_advice(error)} Checkpoints that were there "
            "before still are"
        ) from error


def _advice(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space or lower save_total_limit."
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Make the folder writable or choose another output_dir."
    return "Check the disk and the message above."
