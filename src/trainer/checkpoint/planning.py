"""What torch.distributed.checkpoint needs to plan with parts of tensors: no more than their places.

Its planners are used as they are; only tensors are looked up here, as parts are plain tensors that know
neither a mesh nor a device of it, so that copies on the host can be saved while training goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from trainstep import sharded


class Part:
    """A part of a tensor, as ``torch.distributed.checkpoint`` takes it.

    Args:
        tensor: the part; it may be empty.
        shape: of the whole.
        offsets: where it begins.
    """

    def __init__(self, tensor: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> None:
        self.tensor = tensor
        self._shape, self._offsets = torch.Size(shape), torch.Size(offsets)

    @classmethod
    def of(cls, leaf: Any) -> "Part":
        """Return what this process holds of a tensor."""
        if not sharded.is_sharded(leaf):
            return cls(leaf, leaf.shape, (0,) * leaf.ndim)
        (chunk,) = leaf.__create_chunk_list__()
        return cls(leaf.to_local(), leaf.shape, chunk.offsets)

    def size(self) -> torch.Size:
        """Return the shape of the whole."""
        return self._shape

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.tensor.dtype),
                    size=self._shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.tensor.numel() and self._shape.numel():
            return []
        return [ChunkStorageMetadata(offsets=self._offsets, sizes=self.tensor.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.tensor


class SavePlanner(DefaultSavePlanner):
    """Plans a save of parts; of those that several processes have, one writes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the part that an item of the plan is about."""
        parts: Mapping[str, Any] = self.state_dict
        return parts[index.fqn].tensor


class LoadPlanner(DefaultLoadPlanner):
    """Plans which pieces on the disk are needed for the parts of this process."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take over the parts as they are; the base class would look for tensors without memory."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the part that an item of the plan is to be read into."""
        parts: Mapping[str, Any] = self.state_dict
        tensor: Tensor = parts[index.fqn].tensor
        return tensor
