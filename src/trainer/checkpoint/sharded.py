"""``save`` of a state of which every process holds parts: each writes its own, process 0 the rest.

``torch.distributed.checkpoint`` plans who writes what, and tells all processes if one fails; the format on
the disk is that of any checkpoint, safetensors and JSON, with a file of pieces for each process. Nothing is
gathered: no process holds more than its parts at any time. As ever the folder gets its name last, when
all of it is on the disk.
"""

import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from attrs import evolve
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainer.checkpoint import io, space
from trainer.checkpoint.background import BackgroundWriter
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hashing import Hashing, Workers
from trainer.checkpoint.layout import checkpoint_dir, sibling_dir
from trainer.checkpoint.manifest import File, Manifest
from trainer.checkpoint.pieces import piece_name, state_file
from trainer.checkpoint.place import publish, tidy
from trainer.checkpoint.planning import Part, SavePlanner
from trainer.checkpoint.weights import Stored, write_leaves
from trainer.checkpoint.writer import (
    Prepared,
    disk_errors,
    prepare,
    seal,
    settle,
    write_model_files,
    write_texts,
)
from trainstep.serialize import to_flat


def save(root: str | os.PathLike[str], step: int, contents: Contents, group: Any) -> Path:
    """Write ``root/checkpoint-<step>`` together; returns its path on every process.

    Args:
        root: the folder with the checkpoints, which all processes see.
        step: the checkpoint's step.
        contents: ``state`` and ``layout`` of this process's parts; of the rest, that of process 0 counts.
            ``write_model`` writes the model's files other than its weights.
        group: the processes, as a group that exchanges objects on the host.

    Raises:
        CheckpointError: on every process, if one of them fails; what was in ``root`` is still there.
    """
    if contents.state is None or contents.layout is None:
        raise CheckpointError("a checkpoint in pieces needs the state; save a whole one without it")
    final = checkpoint_dir(root, step)
    writer = _Writer(Path(root), step, contents)
    leaves = to_flat(contents.state)[0]
    places = contents.layout.places
    whole = {leaf: (tuple(tensor.shape), (0,) * tensor.ndim) for leaf, tensor in leaves.items()}
    parts = {leaf: Part(tensor, *places.get(leaf, whole[leaf])) for leaf, tensor in leaves.items()}
    try:
        dcp.save(parts, storage_writer=writer, planner=SavePlanner(), process_group=group)
    except BaseException as error:
        writer.discard()
        if isinstance(error, CheckpointException):
            raise CheckpointError(_reasons(final, error)) from None
        raise
    return final


class ShardedBackgroundWriter(BackgroundWriter):
    """Saves parts in a thread of every process; the threads talk over a group of their own."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group = group

    def _save(self, root: str | os.PathLike[str], step: int, contents: Contents) -> Path:
        return save(root, step, contents, self._group)


class _Writer(dcp.StorageWriter):
    """The side of ``torch.distributed.checkpoint`` that writes."""

    def __init__(self, root: Path, step: int, contents: Contents) -> None:
        self._root, self._step, self._contents = root, step, contents
        self._final = checkpoint_dir(root, step)
        self._made: Path | None = None
        self._prepared: Prepared | None = None
        self._others = Stored(())  # what is not in pieces

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse names: the folder is given at construction."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Turn all but the tensors into bytes, so that what JSON refuses is refused before writing."""
        if is_coordinator:
            prepared = prepare(self._contents)
            layout = self._contents.layout
            assert layout is not None
            state = {"state": layout.metadata, "model": layout.model}
            self._prepared = evolve(prepared, train_state={**prepared.train_state, **state})

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder and write the model's files, on process 0; tell the others where it is."""
        assert self._prepared is not None
        folder = sibling_dir(self._root, "tmp", self._step)
        with disk_errors(self._final):
            self._root.mkdir(parents=True, exist_ok=True)
            tidy(self._root, self._step)
            space.check(self._root, self._prepared.needed * len(plans))
            io.make_folder(folder)
            self._made = folder
            self._others = Stored({_name(item) for plan in plans for item in plan.items})
            write_model_files(folder, self._contents, self._others)
        return [replace(plan, storage_data=(str(folder), rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this process's pieces to its file."""
        folder, rank = Path(plan.storage_data[0]), plan.storage_data[1]
        pieces = {_name(item): planner.resolve_data(item) for item in plan.items}
        record = None
        with disk_errors(self._final):
            if not folder.is_dir():
                raise CheckpointError(
                    f"{self._root}: process {rank} does not see the folder that process 0 made there. "
                    "output_dir must be on a file system that all machines share"
                )
            if pieces:
                record = _write_pieces(folder, state_file(rank), pieces)
        results = [
            WriteResult(item.index, pieces[_name(item)].nbytes, None if number else record)
            for number, item in enumerate(plan.items)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and the manifest, and put the folder in its place; on process 0."""
        assert self._made is not None
        assert self._prepared is not None
        files: dict[str, File] = {}
        leaves: dict[str, str] = {}
        for record in (one.storage_data for many in results for one in many if one.storage_data):
            files |= record["files"]
            leaves |= record["leaves"]
            self._others.where |= record["where"]
            self._others.raw |= record["raw"]
        self._prepared.train_state["pieces"] = _index(metadata)
        with disk_errors(self._final), closing(Workers(1)) as syncing:
            write_texts(self._made, self._prepared, self._others, syncing)
            syncing.join()
            files |= self._others.files(self._made, {})
            world_size = self._contents.world_size
            seal(self._made, Manifest(self._step, world_size, files, leaves))
            publish(self._made, self._final, self._step)

    def discard(self) -> None:
        """Remove what was written, after a failure."""
        if self._made is not None:
            with suppress(OSError):
                io.remove_tree(self._made)


def _name(item: WriteItem) -> str:
    data = item.tensor_data
    assert data is not None
    assert item.index.offset is not None
    return piece_name(item.index.fqn, data.size, item.index.offset, data.chunk.sizes)


def _write_pieces(folder: Path, name: str, pieces: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file of pieces to the disk; returns what process 0 must know of it."""
    stored = Stored(frozenset(pieces))
    settle(dict(pieces))
    with Hashing() as hashing, closing(Workers(1)) as syncing:
        write_leaves(folder / name, name, dict(pieces), stored, hashing, syncing)
        hashing.join()
        syncing.join()
    files = stored.files(folder, hashing.leaves)
    return {"files": files, "leaves": hashing.leaves, "where": stored.where, "raw": stored.raw}


def _index(metadata: Metadata) -> dict[str, Any]:
    """Return leaf -> piece -> [offsets, lengths], of the leaves that are in several pieces."""
    index: dict[str, Any] = {}
    for leaf, found in metadata.state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        if [tuple(chunk.sizes) for chunk in found.chunks] == [tuple(found.size)]:
            continue
        index[leaf] = {
            piece_name(leaf, found.size, chunk.offsets, chunk.sizes): [
                list(chunk.offsets),
                list(chunk.sizes),
            ]
            for chunk in found.chunks
        }
    return index


def _reasons(final: Path, error: CheckpointException) -> str:
    """Return what went wrong where, from what every process was told."""
    told = [f"process {rank}: {failure}" for rank, (failure, _) in sorted(error.failures.items())]
    return f"{final}: it was not saved. " + "; ".join(told)
