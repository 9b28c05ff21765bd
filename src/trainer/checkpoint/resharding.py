"""Reading a state into parts, however many processes wrote it and in whatever pieces.

``torch.distributed.checkpoint`` finds out which pieces overlap the parts of this process; those are read,
and verified, and nothing else.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.futures import Future

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.pieces import part
from trainer.checkpoint.planning import LoadPlanner, Part
from trainer.checkpoint.source import Piece, Source


def read_into(source: Source, targets: Mapping[str, Tensor], group: Any) -> None:
    """Fill tensors, of which each process may hold a part (DTensor), from a checkpoint; all must call.

    Args:
        source: the checkpoint.
        targets: tensors by leaf, the same leaves on every process, of the checkpoint's shapes.
        group: the processes, as a group that exchanges objects on the host.

    Raises:
        CheckpointError: on every process, if one of them cannot read what it needs.
    """
    parts: dict[str, Any] = {leaf: Part.of(tensor) for leaf, tensor in targets.items()}
    try:
        with torch.no_grad():
            dcp.load(
                parts, storage_reader=_Reader(source), planner=LoadPlanner(), process_group=group
            )
    except CheckpointException as error:
        told = [f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        raise CheckpointError("; ".join(sorted(set(told)))) from None


class _Reader(dcp.StorageReader):
    """The side of ``torch.distributed.checkpoint`` that reads."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse names: the checkpoint is given at construction."""
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return where the pieces of every leaf belong."""
        source = self._source
        return Metadata(
            {
                leaf: TensorStorageMetadata(
                    TensorProperties(dtype=dtype),
                    torch.Size(shape),
                    [
                        ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.lengths))
                        for piece in source.pieces[leaf]
                    ],
                )
                for leaf, (dtype, shape) in source.whole.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing has to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read each piece that is needed once, and copy from it what belongs to this process."""
        wanted: dict[tuple[str, Piece], list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault((item.storage_index.fqn, self._piece(item)), []).append(item)
        for (leaf, piece), items in wanted.items():
            tensor = self._source.read(leaf, piece)
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(part(tensor, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _piece(self, item: ReadItem) -> Piece:
        index = item.storage_index
        offsets = tuple(index.offset or ())
        return next(p for p in self._source.pieces[index.fqn] if p.offsets == offsets)
